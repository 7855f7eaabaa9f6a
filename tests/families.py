"""Small models of every family that the installed transformers can build, under the tap.

`python tests/families.py` writes the lists of docs/families.md anew.
"""

import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import tokenweights as tw
from tokenweights.capture.layers import registry

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    "encoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
}
TITLES = {
    "causal": "Language models",
    "image": "Models of images and text, run on text",
    "encoder": "Encoders with a decoder, read in the decoder",
}
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
MARK = "<!-- what follows is written by tests/families.py -->"
RIGHT, NOT_BUILT = "every attention layer", "not tried: common sizes build no small model"
# Parameters whose larger values make attention peaked.
PEAKED = ("q_", "k_", "qkv", "c_attn", "kv_", "query", "key")
LARGEST = 40_000_000  # parameters; what no common name makes smaller is not built
TOLERANCE = 1e-5  # of the larger of 1 and the entropy

# Sizes under all the names that configurations have for them; each takes those it knows.
SIZES = {
    64: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx "
    "max_target_positions max_source_positions",
    48: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim "
    "intermediate_size_mlp",
    32: "hidden_size n_embd d_model embed_dim word_embed_proj_dim lru_width rnn_hidden_size "
    "text_hidden_size audio_hidden_size out_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank "
    "expert_ffn_hidden_size qk_head_dim mamba_d_head mamba_head_dim mamba_dt_rank",
    8: "head_dim global_head_dim swa_head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim "
    "mamba_d_state ssm_state_size state_size linear_key_head_dim linear_value_head_dim "
    "linear_head_dim hidden_size_per_layer_input index_head_dim",
    5: "sliding_window attention_chunk_size attention_window_size",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head "
    "n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts laurel_rank rotary_dim mamba_n_heads "
    "mamba_num_heads linear_num_value_heads linear_num_key_heads",
    2: "encoder_layers num_key_value_heads num_experts_per_tok moe_topk moe_k "
    "first_k_dense_replace mamba_expand index_n_heads eos_token_id attn_layer_period",
    1: "n_group topk_group num_expert_group n_groups mamba_n_groups partial_rotary_factor "
    "bos_token_id attn_layer_offset",
    0: "pad_token_id num_kv_shared_layers",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"is_decoder": True, "mamba_d_ssm": 64, "attn_layer_indices": [1, 3]}
# What some families need in place of, or beside, the common sizes; the first that runs is taken.
VARIANTS: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4, "partial_rotary_factor": None},
    {"num_experts_per_tok": 1},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2},
]


class NotBuilt(Exception):
    """Says why a family's small model is not there."""


@dataclass(frozen=True)
class Outcome:
    """What the tap made of a model: its layers that agree, and the reasons against others."""

    right: tuple[int, ...]
    refused: tuple[str, ...]


def families() -> list[tuple[str, str]]:
    """Task and model type of every configuration class of the tasks."""
    known = {(task, config.model_type) for task, mapping in TASKS.items() for config in mapping}
    seen = {name for task, name in known if task == "causal"}
    return sorted(pair for pair in known if pair[0] == "causal" or pair[1] not in seen)


def small_model(task: str, family: str) -> nn.Module:
    """A model of a family with peaked attention, in evaluation mode, under eager attention."""
    config_class = next(c for c in TASKS[task] if c.model_type == family)
    model_class = TASKS[task][config_class]
    model_class = model_class[0] if isinstance(model_class, tuple | list) else model_class
    reasons = []
    for variant in VARIANTS:
        try:
            model = _built(model_class, _small_config(config_class, variant))
            with torch.no_grad():
                model(**inputs(model))
            return model
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
    raise NotBuilt("; ".join(dict.fromkeys(reasons)))


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Token ids with padding on the left; for an encoder-decoder also ids to decode."""
    ids = torch.randint(3, 32, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[0, :4] = mask[1, :1] = 0
    made = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = ids.flip(0)
    return made


def outcome(model: nn.Module) -> Outcome:
    """Runs the tap at every layer of a model and looks whether its entropies are right."""
    right, refused = [], {}
    try:
        layers = tw.attention_layers(model)
    except tw.TokenWeightsError as error:
        return Outcome((), (f"several stacks: {_reason(error)}",))
    if not layers:
        with pytest.raises(tw.TokenWeightsError), tw.capture_attention(model, [0]):
            pass
        return Outcome((), ("attention code of its own",))
    for layer, module in layers.items():
        try:
            with torch.no_grad(), multipliers(module) as seen:
                with tw.capture_attention(model, [layer]) as capture:
                    model(**inputs(model))
                (captured,), (matrix,) = capture.calls[layer], seen
            got, expected = captured.entropy(kind="raw").double(), entropy(matrix)
            if captured.key_mask is not None:
                expected = torch.where(captured.key_mask, expected, 0.0)
            assert bool(((got - expected).abs() <= TOLERANCE * expected.clamp(min=1)).all()), (
                f"layer {layer} is off by {(got - expected).abs().max():.1e} nats"
            )
            right.append(layer)
        except tw.TokenWeightsError as error:
            refused[_reason(error)] = None
    return Outcome(tuple(right), tuple(refused))


@contextmanager
def multipliers(module: nn.Module) -> Iterator[list[Tensor]]:
    """A context in which every attention of a module leaves the matrix that multiplies its values.

    The attention function itself tells: it is linear in the values, so that unit vectors in their
    place give its weights, sinks and all that it does to them included.
    """
    functions, matrices = registry(module), []
    original = functions.get_interface

    def look_up(name: str, default: Any) -> Any:
        function = original(name, default)

        @wraps(function)
        def seen(caller: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest, **options):
            if caller is module:
                unit = torch.eye(key.shape[2], dtype=query.dtype)
                unit = unit.expand(key.shape[0], value.shape[1], -1, -1)
                matrix = function(caller, query, key, unit, *rest, **options)[0]
                matrices.append(matrix.transpose(1, 2))
            return function(caller, query, key, value, *rest, **options)

        return seen

    functions.get_interface = look_up
    try:
        yield matrices
    finally:
        del functions.get_interface


def entropy(matrix: Tensor) -> Tensor:
    """Entropy in nats of the head-averaged rows of an attention matrix, in float64."""
    average = matrix.double().mean(1)
    share = average / average.sum(-1, keepdim=True)
    return -torch.xlogy(share, share).sum(-1)


def _small_config(config_class: type, variant: dict[str, Any]) -> Any:
    plain = config_class()
    options = {}
    for name, size in {**SMALL, **variant}.items():
        known = name in inspect.signature(config_class.__init__).parameters or _has(plain, name)
        # A tower beside the language model has rotations of another kind.
        known &= name != "rope_parameters" or _has(plain, "vocab_size")
        # A window that is None by default is one that the family's layers do without.
        without = name == "sliding_window" and name not in variant and _is_none(plain, name)
        if known and size is not None and not without:
            options[name] = deepcopy(size)  # configurations write into what they are given
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(plain, name, None)
        if part is not None:
            options[name] = _small_config(type(part), variant)
    return config_class(**options)


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except Exception:  # some say of a name that it differs between layers
        return True


def _is_none(config: Any, name: str) -> bool:
    return _has(config, name) and getattr(config, name, None) is None


def _built(model_class: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        empty = model_class._from_config(config, attn_implementation="eager")
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > LARGEST:
        raise NotBuilt(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    # Fresh models attend almost uniformly; larger projections make the distributions peaked.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sink" in name:
                parameter.normal_(0, 1)
            elif parameter.dim() == 2 and any(part in name for part in PEAKED):
                parameter.normal_(0, 0.7)
    return model


def _reason(error: tw.TokenWeightsError) -> str:
    """What the tap said was wrong, without the layer it said it of."""
    got = str(error).split(", got ", 1)[1].split(". ")[0]
    return got.split("`), ", 1)[-1] if "`), " in got else got


def verdict(task: str, family: str) -> str:
    """What came of a family, in the words of the page."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            model = small_model(task, family)
        except NotBuilt:
            return NOT_BUILT
        found = outcome(model)
        if found.right and getattr(model, "_supports_sdpa", False):
            model.set_attn_implementation("sdpa")
            assert outcome(model) == found, "sdpa and eager attention differ"
    if not found.refused:
        return RIGHT
    reasons = "; ".join(found.refused)
    return f"some layers; of others refused: {reasons}" if found.right else f"refused: {reasons}"


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the log of transformers, which says much about sizes it does not like."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def lists() -> str:
    """The generated part of the page: a list for each task, an item for each verdict."""
    rows: dict[str, defaultdict[str, list[str]]] = {task: defaultdict(list) for task in TASKS}
    for task, family in families():
        rows[task][verdict(task, family)].append(family)
    parts = [f"Seen with transformers {transformers.__version__}.\n"]
    for task, found in rows.items():
        parts.append(f"\n## {TITLES[task]}\n\n")
        for what, names in sorted(found.items(), key=lambda row: (-len(row[1]), row[0])):
            parts.append(f"* **{what}** ({len(names)}): {', '.join(names)}\n")
    return "".join(parts)


def documented() -> tuple[str, dict[tuple[str, str], str]]:
    """Version of transformers, and the verdict of each task and family, that the page has."""
    generated = PAGE.read_text().split(MARK)[1]
    version = generated.split("transformers ", 1)[1].split(".\n")[0]
    found, task = {}, ""
    for line in generated.splitlines():
        if line.startswith("## "):
            task = next(name for name, title in TITLES.items() if line == f"## {title}")
        elif line.startswith("* **"):
            what, names = line.removeprefix("* **").split("** (")
            names = names.split("): ")[1]
            found |= {(task, family): what for family in names.split(", ")}
    return version, found


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = PAGE.read_text().split(MARK)[0]
    PAGE.write_text(f"{before}{MARK}\n\n{lists()}")
