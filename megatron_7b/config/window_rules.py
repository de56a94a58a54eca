"""Rules for attention to a window of the newest tokens."""

from collections.abc import Iterator

from megatron_7b.config.architectures import ARCHITECTURES
from megatron_7b.config.problems import Problem
from megatron_7b.config.rule import Case, Rule, adder_to

RULES: list[Rule] = []
rule = adder_to(RULES)

_SIZE, _LAYERS = "model.window_size", "model.window_attn_skip_freq"


@rule("model.architecture", _SIZE)
def _architecture_has_windows(case: Case) -> Iterator[Problem]:
    model = case.config.model
    if model.window_size is not None and model.traits.windows == "none":
        having = [name for name, traits in ARCHITECTURES.items() if traits.windows != "none"]
        yield case.problem(_SIZE, f"must be none in {model.architecture}; only {', '.join(having)} have windows")


@rule(_SIZE, "model.max_position_embeddings")
def _texts_are_longer_than_windows(case: Case) -> Iterator[Problem]:
    size, longest = case.config.model.window_size, case.config.model.max_position_embeddings
    if size is not None and size >= longest:
        yield case.problem(_SIZE, f"must be below model.max_position_embeddings = {longest}, or none: it hides nothing")


@rule("model.architecture", _LAYERS, _SIZE, "model.num_layers")
def _layers_without_window_are_some(case: Case) -> Iterator[Problem]:
    model = case.config.model
    given, layers = model.window_attn_skip_freq, model.num_layers
    if not given:
        return
    if model.window_size is None:
        yield case.problem(_LAYERS, "only applies with model.window_size")
    elif model.traits.windows == "all layers":
        having = [name for name, traits in ARCHITECTURES.items() if traits.windows == "some layers"]
        yield case.problem(
            _LAYERS,
            f"must be left out in {model.architecture}, whose layers all have the window; {' and '.join(having)} may "
            "have others",
        )
    elif len(given) == 1:
        if not 2 <= given[0] <= layers:
            yield case.problem(
                _LAYERS, f"must be a number N from 2 to model.num_layers = {layers}: every N-th layer sees all tokens"
            )
    elif len(given) != layers or set(given) != {0, 1}:
        yield case.problem(
            _LAYERS,
            f"must be one number N, or model.num_layers = {layers} numbers, 1 for each layer with a window and 0 for "
            "each without, both of which there are",
        )


@rule(_SIZE, "parallel.context_parallel_size", "model.transformer_impl", "runtime.device")
def _cut_sequences_have_windows_in_local_layers_only(case: Case) -> Iterator[Problem]:
    # Transformer Engine's ranks pass keys around a ring (p2p), which has no windows; its all_gather has, not tried yet.
    cp, impl = case.config.parallel.context_parallel_size, case.config.model.transformer_impl
    uses_engine = impl == "transformer_engine" or (impl == "auto" and case.config.runtime.device == "cuda")
    if case.config.model.window_size is not None and cp > 1 and uses_engine:
        yield case.problem(
            _SIZE,
            f"with parallel.context_parallel_size = {cp}, Transformer Engine's ranks pass keys on, which has no "
            "windows: set model.transformer_impl to local, or one of these to none or 1",
        )
