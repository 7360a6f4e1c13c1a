"""Where each parameter of the trunk lies in a Hugging Face checkpoint: one table per family.

An entry maps our path to a tensor's name and to a layout written as in einops, file first:
`(H d) D -> D H d` says that the file's rows are heads times head features and ours are split.
`1/3` is place 1 on a fused axis of three: GPT-NeoX interleaves query, key and value per head.
`*` in a name is the layer, which is the leading axis of our leaf.

Axis key: V vocabulary, P positions, D width, H heads, d head size, F hidden, r head size where the
file rotates the pairs (2j, 2j + 1) and we rotate (j, j + d/2).
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlib_methods.models.config import TransformerConfig

Table = Mapping[str, tuple[str, str]]


def _norm(path: str, name: str) -> Table:
    return {f"{path}/scale": (f"{name}.weight", "D"), f"{path}/bias": (f"{name}.bias", "D")}


def _split(path: str, name: str) -> Table:
    """A projection to heads."""
    return {
        f"{path}/kernel": (f"{name}.weight", "(H d) D -> D H d"),
        f"{path}/bias": (f"{name}.bias", "(H d) -> H d"),
    }


def _fused(path: str, name: str, part: int) -> Table:
    return {
        f"{path}/kernel": (f"{name}.weight", f"(H {part}/3 d) D -> D H d"),
        f"{path}/bias": (f"{name}.bias", f"(H {part}/3 d) -> H d"),
    }


def _merge(path: str, name: str) -> Table:
    """A projection from heads."""
    return {
        f"{path}/kernel": (f"{name}.weight", "D (H d) -> H d D"),
        f"{path}/bias": (f"{name}.bias", "D"),
    }


def _dense(path: str, name: str) -> Table:
    return {
        f"{path}/kernel": (f"{name}.weight", "F D -> D F"),
        f"{path}/bias": (f"{name}.bias", "F"),
    }


_LLAMA: Table = {
    "embedding/table": ("model.embed_tokens.weight", "V D"),
    "head/kernel": ("lm_head.weight", "V D -> D V"),
    **_norm("final_norm", "model.norm"),
    **_norm("blocks/attention_norm", "model.layers.*.input_layernorm"),
    **_norm("blocks/mlp_norm", "model.layers.*.post_attention_layernorm"),
    **_split("blocks/attention/query", "model.layers.*.self_attn.q_proj"),
    **_split("blocks/attention/key", "model.layers.*.self_attn.k_proj"),
    **_split("blocks/attention/value", "model.layers.*.self_attn.v_proj"),
    **_merge("blocks/attention/output", "model.layers.*.self_attn.o_proj"),
    **_norm("blocks/attention/query_norm", "model.layers.*.self_attn.q_norm"),
    **_norm("blocks/attention/key_norm", "model.layers.*.self_attn.k_norm"),
    **_dense("blocks/mlp/gate", "model.layers.*.mlp.gate_proj"),
    **_dense("blocks/mlp/up", "model.layers.*.mlp.up_proj"),
    **_dense("blocks/mlp/down", "model.layers.*.mlp.down_proj"),
}

_GPT_NEOX: Table = {
    "embedding/table": ("gpt_neox.embed_in.weight", "V D"),
    "head/kernel": ("embed_out.weight", "V D -> D V"),
    **_norm("final_norm", "gpt_neox.final_layer_norm"),
    **_norm("blocks/attention_norm", "gpt_neox.layers.*.input_layernorm"),
    **_norm("blocks/mlp_norm", "gpt_neox.layers.*.post_attention_layernorm"),
    **_fused("blocks/attention/query", "gpt_neox.layers.*.attention.query_key_value", 0),
    **_fused("blocks/attention/key", "gpt_neox.layers.*.attention.query_key_value", 1),
    **_fused("blocks/attention/value", "gpt_neox.layers.*.attention.query_key_value", 2),
    **_merge("blocks/attention/output", "gpt_neox.layers.*.attention.dense"),
    **_dense("blocks/mlp/up", "gpt_neox.layers.*.mlp.dense_h_to_4h"),
    **_dense("blocks/mlp/down", "gpt_neox.layers.*.mlp.dense_4h_to_h"),
}

_OPT: Table = {
    "embedding/table": ("model.decoder.embed_tokens.weight", "V D"),
    "position_embedding/table": ("model.decoder.embed_positions.weight", "P D"),
    "head/kernel": ("lm_head.weight", "V D -> D V"),
    **_norm("final_norm", "model.decoder.final_layer_norm"),
    **_norm("blocks/attention_norm", "model.decoder.layers.*.self_attn_layer_norm"),
    **_norm("blocks/mlp_norm", "model.decoder.layers.*.final_layer_norm"),
    **_split("blocks/attention/query", "model.decoder.layers.*.self_attn.q_proj"),
    **_split("blocks/attention/key", "model.decoder.layers.*.self_attn.k_proj"),
    **_split("blocks/attention/value", "model.decoder.layers.*.self_attn.v_proj"),
    **_merge("blocks/attention/output", "model.decoder.layers.*.self_attn.out_proj"),
    **_dense("blocks/mlp/up", "model.decoder.layers.*.fc1"),
    **_dense("blocks/mlp/down", "model.decoder.layers.*.fc2"),
}


def _sandwich(path: str, name: str) -> Table:
    """The blocks of a recurrent-depth checkpoint."""
    attention, mlp = f"{path}/attention", f"{path}/mlp"
    return {
        **_norm(f"{path}/attention_norm", f"{name}.norm_1"),
        **_norm(f"{path}/attention_post_norm", f"{name}.norm_2"),
        **_norm(f"{path}/mlp_norm", f"{name}.norm_3"),
        **_norm(f"{path}/mlp_post_norm", f"{name}.norm_4"),
        f"{attention}/query/kernel": (f"{name}.attn.Wqkv.weight", "(0/3 H r) D -> D H r"),
        f"{attention}/key/kernel": (f"{name}.attn.Wqkv.weight", "(1/3 H r) D -> D H r"),
        f"{attention}/value/kernel": (f"{name}.attn.Wqkv.weight", "(2/3 H d) D -> D H d"),
        f"{attention}/query_bias": (f"{name}.attn.qk_bias", "0/2 0/1 H r -> H r"),
        f"{attention}/key_bias": (f"{name}.attn.qk_bias", "1/2 0/1 H r -> H r"),
        **_merge(f"{attention}/output", f"{name}.attn.proj"),
        f"{mlp}/gate/kernel": (f"{name}.mlp.fc.weight", "(0/2 F) D -> D F"),
        f"{mlp}/up/kernel": (f"{name}.mlp.fc.weight", "(1/2 F) D -> D F"),
        **_dense(f"{mlp}/down", f"{name}.mlp.proj"),
    }


_HUGINN: Table = {
    "embedding/table": ("transformer.wte.weight", "V D"),
    "head/kernel": ("lm_head.weight", "V D -> D V"),
    **_norm("final_norm", "transformer.ln_f"),
    **_dense("adapter", "transformer.adapter"),
    **_sandwich("prelude/blocks", "transformer.prelude.*"),
    **_sandwich("core/blocks", "transformer.core_block.*"),
    **_sandwich("coda/blocks", "transformer.coda.*"),
}

TABLES: Mapping[str, Table] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": _GPT_NEOX,
    "opt": _OPT,
    "huginn_raven": _HUGINN,
}

# Buffers that older checkpoints carry: recomputed, never weights.
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attention\.(masked_)?bias$|^freqs_cis$")
_HEADS = ("lm_head.weight", "embed_out.weight")


def is_ignorable(name: str, cfg: TransformerConfig) -> bool:
    """Whether a tensor of a checkpoint may be left unread."""
    return bool(_BUFFERS.search(name)) or (cfg.tie_embeddings and name in _HEADS)


def _place(axis: str) -> tuple[int, int] | None:
    """Place and size of a fused axis; None for an axis of ours."""
    place, _, size = axis.partition("/")
    return (int(place), int(size)) if size else None


def _pairs(size: int) -> np.ndarray:
    """Where our features of a head lie in a file that rotates adjacent pairs."""
    return np.arange(size).reshape(-1, 2).T.ravel()


@dataclasses.dataclass(frozen=True)
class Placement:
    """One parameter and its tensors: `shape` is our leaf's, layers first where `name` has a `*`.

    source: the file's axes, each a group of axis letters; target: ours, without the layers.
    """

    path: str
    shape: tuple[int, ...]
    name: str
    source: tuple[tuple[str, ...], ...]
    target: tuple[str, ...]
    vocab_size: int

    @property
    def layers(self) -> Sequence[int | None]:
        """The layers of the leaf, or one None for a parameter outside the blocks."""
        return range(self.shape[0]) if "*" in self.name else [None]

    @property
    def part(self) -> str | None:
        """The place on an axis that other parameters share, or None."""
        shared = (a for group in self.source for a in group if (_place(a) or (0, 1))[1] > 1)
        return next(shared, None)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size in the file, where the vocabulary is not padded."""
        ours = self.shape[1:] if "*" in self.name else self.shape
        sizes = dict(zip(self.target, ours, strict=True))
        if "V" in sizes:
            sizes["V"] = self.vocab_size
        return sizes

    @property
    def file_shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the file."""
        return tuple(math.prod(map(self._size, group)) for group in self.source)

    def _size(self, axis: str) -> int:
        place = _place(axis)
        return self.sizes[axis] if place is None else place[1]

    def file_name(self, layer: int | None) -> str:
        """Name of the tensor that holds this layer."""
        return self.name.replace("*", str(layer))

    def read(
        self, tensor: Callable[[str], Any], index: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        """The part of the leaf that `index` selects, reading only the bytes it needs.

        tensor: name -> something that gives an array when sliced. Padded rows are zero.
        """
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        out = np.zeros([stop - start for start, stop in bounds], dtype)
        if "*" not in self.name:
            self._fill(out, tensor(self.name), bounds)
            return out
        for i, layer in enumerate(range(*bounds[0])):
            self._fill(out[i], tensor(self.file_name(layer)), bounds[1:])
        return out

    def _fill(self, out: np.ndarray, tensor: Any, bounds: Sequence[tuple[int, int]]) -> None:
        sizes = self.sizes
        wanted = {
            axis: (start, min(stop, sizes[axis]))
            for axis, (start, stop) in zip(self.target, bounds, strict=True)
        }
        if any(start >= stop for start, stop in wanted.values()):
            return  # nothing but padding
        # The file's pairs are not ours: a part of them lies all over the file's.
        read = wanted | ({"r": (0, sizes["r"])} if "r" in sizes else {})
        cuts = [self._cut(group, read) for group in self.source]
        view = [size for _, shape, _ in cuts for size in shape]
        picks = [pick for _, _, picked in cuts for pick in picked]
        block = np.asarray(tensor[tuple(rows for rows, _, _ in cuts)])
        block = block.reshape(view)[tuple(picks)]
        block = block.transpose([self._axes.index(axis) for axis in self.target])
        if "r" in sizes:
            order = _pairs(sizes["r"])[slice(*wanted["r"])]
            block = block.take(order, axis=self.target.index("r"))
        out[tuple(slice(n) for n in block.shape)] = block

    def _cut(
        self, group: Sequence[str], wanted: Mapping[str, tuple[int, int]]
    ) -> tuple[slice, list[int], list[Any]]:
        """What to read of an axis of the file, the axes in it, and what to pick of each."""
        stride = math.prod(map(self._size, group))
        begin, view, picks, contiguous = 0, [], [], True
        for axis in group:
            place, size = _place(axis), self._size(axis)
            stride //= size
            start, stop = wanted[axis] if place is None else (place[0], place[0] + 1)
            if contiguous:  # all before it are one index
                begin += start * stride
                size, start, stop = stop - start, 0, stop - start
                contiguous = size == 1
            view.append(size)
            picks.append(slice(start, stop) if place is None else start)
        return slice(begin, begin + math.prod(view)), view, picks

    @functools.cached_property
    def _axes(self) -> list[str]:
        return [axis for group in self.source for axis in group if _place(axis) is None]

    def block(self, ours: np.ndarray) -> np.ndarray:
        """One layer of ours, without padding, with its axes in the file's order."""
        ours = ours[tuple(slice(self.sizes[axis]) for axis in self.target)]
        if "r" in self.target:
            axis = self.target.index("r")
            ours = ours.take(np.argsort(_pairs(ours.shape[axis])), axis=axis)
        return ours.transpose([self.target.index(axis) for axis in self._axes])


def join(parts: Sequence[Placement], blocks: Sequence[np.ndarray]) -> np.ndarray:
    """The file's tensor from the blocks of the parameters that share it, in their fused order."""
    first = parts[0]
    tensor = blocks[0]
    if first.part is not None:
        flat = [a for group in first.source for a in group if _place(a) != (0, 1)]
        in_order = sorted(zip(parts, blocks, strict=True), key=lambda pair: str(pair[0].part))
        tensor = np.stack([block for _, block in in_order], flat.index(first.part))
    # safetensors writes the buffer as it lies and does not look at strides.
    return np.ascontiguousarray(tensor.reshape(first.file_shape))


def placements(
    cfg: TransformerConfig, shapes: Mapping[str, tuple[int, ...]], model_type: str
) -> list[Placement]:
    """The placement of every parameter; shapes: path -> shape of our leaves."""
    table = TABLES[model_type]
    found = []
    for path, shape in shapes.items():
        name, layout = table[path]
        left, _, right = layout.partition(" -> ")
        groups = re.findall(r"\([^)]*\)|\S+", left)
        source = tuple(tuple(group.strip("()").split()) for group in groups)
        target = tuple((right or left).split())
        found.append(Placement(path, shape, name, source, target, cfg.vocab_size))
    return found
