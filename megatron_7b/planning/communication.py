"""Seconds that ranks of one layout exchange data, from the bandwidths of their links and who is on the same node."""

from dataclasses import dataclass

from megatron_7b.parallel import ParallelLayout
from megatron_7b.planning.devices import Device


@dataclass(frozen=True)
class Links:
    """What connects the ranks of a layout: tensor ranks are neighbours, pipeline stages are farthest apart."""

    device: Device
    layout: ParallelLayout

    def tensor_parallel_seconds(self, states: float, products: float) -> float:
        """Return what one layer exposes for a microbatch.

        Forward there are four all-gathers or reduce-scatters (or two all-reduces of twice the size), backward the same
        and two more; of the backward ones four run beside matrix products.

        Args:
            states: Bytes of the hidden states of a microbatch.
            products: Seconds of the layer's matrix products, forward and backward.
        """
        tp = self.layout.tp_size
        if tp == 1:
            return 0.0
        one = self._transfer(states, tp, self._bandwidth(1, tp))
        hidden = 4 * one
        return 6 * one + max(0.1 * hidden, hidden - 0.6 * products)

    def context_parallel_seconds(self, keys_and_values: float, attention: float) -> float:
        """Return what one layer exposes: keys and values go around forward, with their gradients backward."""
        cp = self.layout.cp_size
        if cp == 1:
            return 0.0
        once = self._transfer(keys_and_values * cp, cp, self._bandwidth(self.layout.tp_size, cp))
        seconds = 3 * once
        # On GPUs, Transformer Engine sends the next piece while it attends to one.
        return seconds if self.device.type == "cpu" else max(0.1 * seconds, seconds - 0.8 * attention)

    def expert_parallel_seconds(self, tokens: float) -> float:
        """Return what one layer takes to send `tokens` bytes to experts and back, forward and backward."""
        ep = self.layout.ep_size
        if ep == 1:
            return 0.0
        return 4 * self._transfer(tokens, ep, self._all_to_all_bandwidth(self.layout.tp_size, ep))

    def pipeline_seconds(self, states: float, number: int) -> float:
        """Return what sending activations forward and gradients back exposes in a step of `number` microbatches."""
        layout = self.layout
        stride = layout.world_size // layout.pp_size
        bandwidth = self._link if stride < self.device.node_size else self._network
        each = states / bandwidth + self.device.latency
        # Interleaved stages send more often, but beside their work.
        return 2 * number * each * (1.0 if layout.num_chunks == 1 else 0.3 * layout.num_chunks)

    def scatter_seconds(self, size: float, *, experts: bool = False) -> float:
        """Return what a reduce-scatter, or an all-gather, of `size` bytes over replicas takes, or those of experts."""
        layout = self.layout
        replicas, stride = layout.dp_size * layout.cp_size, layout.tp_size
        if experts:
            replicas, stride = replicas // layout.ep_size, stride * layout.ep_size
        if size == 0 or replicas == 1:
            return 0.0
        return self._transfer(size, replicas, self._bandwidth(stride, replicas))

    def _transfer(self, size: float, ranks: int, bandwidth: float) -> float:
        return size * (ranks - 1) / ranks / bandwidth + self.device.latency

    @property
    def _link(self) -> float:
        return self.device.link_bandwidth * self.device.efficiency.link

    @property
    def _network(self) -> float:
        return self.device.network_bandwidth * self.device.efficiency.network

    def _bandwidth(self, stride: int, size: int) -> float:
        """Return what a rank of a group gets in a ring, whose members of one node share their network adapters."""
        if stride * size <= self.device.node_size:
            return self._link
        members = max(1, self.device.node_size // stride)
        return min(self._link, members * self._network)

    def _all_to_all_bandwidth(self, stride: int, size: int) -> float:
        """Return what a rank gets if it sends different data to each of the others."""
        if stride * size <= self.device.node_size:
            return self._link
        members = max(1, self.device.node_size // stride)
        outside = (size - members) / size
        return min(self._link, self._network / outside)
