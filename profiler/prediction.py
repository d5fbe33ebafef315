"""Multi-token prediction: the layers that DeepSeek-V3's kind is trained with and transformers' causal LM leaves out."""

from __future__ import annotations

from dataclasses import replace

from meshwright import InputError
from meshwright.profiler.layers import HeadLayer, MlpLayer, NormKind, NormLayer
from meshwright.profiler.model import Block, ModelSpec


def with_prediction(model: ModelSpec, depth: int = 1) -> ModelSpec:
    """The model with ``depth`` layers that predict one more token each (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Each is one decoder block more, behind the others: norms of the hidden states and of the next token's embedding, a
    projection ``[2 * hidden -> hidden]`` of both, a block like the model's last, and a norm of its own before the
    shared head, which runs once more for it. The projection stands as a feed-forward layer ``hidden -> hidden ->
    hidden``, which has its parameters and its FLOPs. The head's second run is a tied head: without pipeline it holds
    nothing, and with one it stands for the copy of the token table that the last stage needs for the embeddings
    (Megatron-Core, ``transformer/multi_token_prediction.py``). Left out: the second lookup, rolling the tokens, and the
    sum of that copy's gradients with the first stage's once a step; together below 1 % of a step.

    Counts agree with the checkpoint of DeepSeek-V3: 671.0 billion and 11.6 more, or 685 with the copies of embedding
    and head in it. Raises ``InputError`` with ``depth`` below 1.
    """
    if depth < 1:
        raise InputError(f"depth of prediction must be at least 1, found {depth}")
    hidden, last = model.hidden, model.decoder_blocks[-1]
    norm = NormLayer(norm_kind=NormKind.RMS, hidden=hidden)
    projection = MlpLayer(hidden=hidden, ffn_size=hidden, gated=False)
    block = Block(kind=last.kind, layers=(norm, norm, projection, *last.layers, norm), repeat=depth)
    again = (replace(model.head, tied=True, bias=False),) * depth
    head = replace(model.blocks[-1], layers=(*model.blocks[-1].layers, *again))
    said = f"trained with {depth} multi-token prediction layer(s), the last of its {model.num_layers + depth} blocks"
    notes = tuple(note for note in model.notes if "multi-token" not in note)
    return replace(model, blocks=(*model.blocks[:-1], block, head), notes=(*notes, said))


def predicted_tokens(model: ModelSpec) -> int:
    """How many tokens more than the next one a model predicts in training: runs of its head but the first."""
    return sum(isinstance(layer, HeadLayer) for layer in model.layers()) - 1
