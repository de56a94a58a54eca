"""How the layers of a model are divided into pipeline stages. Nothing here imports torch."""

from functools import cache


@cache
def divide_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return how many layers each stage has, in the order of the model.

    What is left over when layers are divided evenly goes to stages in the middle, the later ones first, as in 1F1B
    earlier ones hold the activations of more microbatches; then to the first stage, which embeds; never to the last,
    which computes the loss.
    """
    each, left = divmod(num_layers, num_stages)
    taking = [*range(num_stages - 2, 0, -1), 0][:left]
    return tuple(each + (stage in taking) for stage in range(num_stages))
