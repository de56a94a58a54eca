"""What metrics are handed to."""

from megatron_7b.training.metrics import StepMetrics, TaskMetrics, ValidationMetrics


class Sink:
    """Something that metrics are written to; methods that it does not override do nothing."""

    def write_step(self, metrics: StepMetrics) -> None:
        """Take the metrics of one step."""

    def write_validation(self, metrics: ValidationMetrics) -> None:
        """Take the metrics of one validation."""

    def write_tasks(self, metrics: TaskMetrics) -> None:
        """Take what the model does on tasks."""

    def close(self) -> None:
        """Flush, and release everything."""
