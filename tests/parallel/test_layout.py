"""The rank grid against megatron-core's own process groups: the same neighbours for every rank of many shapes."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_7b.config.schema import ParallelConfig
from megatron_7b.errors import ConfigError
from megatron_7b.parallel import ParallelLayout, build_layout
from tests.support.ranks import run_ranks


class Shape(NamedTuple):
    tp: int
    pp: int
    cp: int
    dp: int
    vpp: int | None = None

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            context_parallel_size=self.cp,
            virtual_pipeline_model_parallel_size=self.vpp,
        )

    def layout(self, rank: int) -> ParallelLayout:
        return build_layout(self.config, world_size=self.world_size, rank=rank)


SHAPES = [
    Shape(tp, pp, cp, dp) for tp in (1, 2, 4) for pp in (1, 2, 3) for cp in (1, 2) for dp in (1, 2, 3)
] + [Shape(2, 4, 1, 2, vpp=2), Shape(1, 2, 2, 2, vpp=3), Shape(8, 8, 1, 2)]  # fmt: skip
AXES = ("tp", "pp", "cp", "dp")


def groups_of_megatron_core(shapes: list[Shape]) -> list[list[dict[str, list[int]]]]:
    """Entry point of a process: per shape and rank, the ranks of the group of each axis, as megatron-core builds them.

    torch's fake backend lets one process be any rank of a world of any size.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state as state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    groups = {
        "tp": state.get_tensor_model_parallel_group,
        "pp": state.get_pipeline_model_parallel_group,
        "cp": state.get_context_parallel_group,
        "dp": state.get_data_parallel_group,
        "replicas": lambda: state.get_data_parallel_group(with_context_parallel=True),
    }
    dist.destroy_process_group()
    found = []
    for shape in shapes:
        found.append([])
        for rank in range(shape.world_size):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=shape.world_size)
            state.initialize_model_parallel(
                tensor_model_parallel_size=shape.tp,
                pipeline_model_parallel_size=shape.pp,
                virtual_pipeline_model_parallel_size=shape.vpp,
                context_parallel_size=shape.cp,
                create_gloo_process_groups=False,
            )
            found[-1].append({axis: dist.get_process_group_ranks(group()) for axis, group in groups.items()})
            state.destroy_model_parallel()
            dist.destroy_process_group()
    return found


def coordinates(layout: ParallelLayout) -> dict[str, int]:
    return {axis: getattr(layout, f"{axis}_rank") for axis in AXES}


def neighbours(shape: Shape, rank: int, *along: str) -> list[int]:
    """Ranks that differ from this one at most along these axes."""
    own = coordinates(shape.layout(rank))
    return [
        other
        for other in range(shape.world_size)
        if all(value == own[axis] for axis, value in coordinates(shape.layout(other)).items() if axis not in along)
    ]


def test_every_rank_has_the_neighbours_of_megatron_core() -> None:
    (found,) = run_ranks(1, groups_of_megatron_core, SHAPES)
    for shape, of_ranks in zip(SHAPES, found, strict=True):
        for rank, groups in enumerate(of_ranks):
            expected = {axis: neighbours(shape, rank, axis) for axis in AXES}
            assert groups == {**expected, "replicas": neighbours(shape, rank, "dp", "cp")}, (shape, rank)


sizes = st.integers(1, 6)
shapes = st.builds(Shape, sizes, sizes, sizes, sizes, st.none() | st.integers(2, 4))


@given(shapes)
def test_ranks_and_coordinates_are_one_to_one(shape: Shape) -> None:
    layouts = [shape.layout(rank) for rank in range(shape.world_size)]
    assert len({tuple(coordinates(layout).values()) for layout in layouts}) == shape.world_size
    for layout in layouts:
        assert layout.dp_size == shape.dp
        for axis, coordinate in coordinates(layout).items():
            assert 0 <= coordinate < getattr(shape, axis)


@given(shapes)
def test_ends_of_the_pipeline_and_the_main_rank(shape: Shape) -> None:
    layouts = [shape.layout(rank) for rank in range(shape.world_size)]
    stages = shape.world_size // shape.pp
    assert [layout.is_first_stage for layout in layouts] == [rank < stages for rank in range(shape.world_size)]
    assert [layout.is_last_stage for layout in layouts] == [
        rank >= shape.world_size - stages for rank in range(shape.world_size)
    ]
    assert [layout.rank for layout in layouts if layout.is_main] == [0]
    assert {layout.num_chunks for layout in layouts} == {shape.vpp or 1}


@given(shapes, st.integers(1, 1000))
def test_a_world_of_another_size_is_refused(shape: Shape, world_size: int) -> None:
    model_size = shape.tp * shape.pp * shape.cp
    if world_size % model_size:
        with pytest.raises(ConfigError, match=f"{world_size} ranks cannot hold .* = {model_size} parts of a model"):
            build_layout(shape.config, world_size=world_size, rank=0)
    else:
        assert build_layout(shape.config, world_size=world_size, rank=0).dp_size == world_size // model_size


def test_a_layout_is_spelled_as_its_axes() -> None:
    assert str(Shape(1, 1, 1, 1).layout(0)) == "TP1×PP1×DP1"
    assert str(Shape(2, 4, 2, 3, vpp=2).layout(5)) == "TP2×PP4×VPP2×CP2×DP3"
