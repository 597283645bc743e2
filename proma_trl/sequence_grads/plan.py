"""Decides how each layer of a model is followed."""

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from . import convolution, linear  # noqa: F401 (each registers its rules)
from .embedding import EmbeddingLayer, embedding_refusal
from .experts import ExpertsLayer, ExpertsRule, is_experts
from .images import modules_on_images
from .layer import ONE_SEQUENCE, Layer, base_model
from .norm import BroadcastLayer, broadcasts_parameters
from .probe import children_used_directly
from .product import ProductLayer, multiplies_once
from .registry import RuleLayer, rule_for
from .rerun import RerunLayer
from .trainable_tokens import TrainableTokensRule, is_trainable_tokens

# PEFT's methods with virtual tokens that it makes anew for each sequence
_PROMPTS_OF_A_SEQUENCE = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True)
class Planned:
    """
    A module that holds trainable parameters, and how it is followed.

    Attributes:
        name (`str`): Its name in the model.
        module (`nn.Module`): The module.
        layer ([`Layer`] or `str`): How it is followed, or why it can't be.
    """

    name: str
    module: nn.Module
    layer: Layer | str


def plan_modules(model: nn.Module, with_parents: Collection[nn.Module] = ()) -> list[Planned]:
    """
    How each module that holds trainable parameters is followed, those included that can't be.

    Args:
        model (`nn.Module`): The model.
        with_parents (`Collection[nn.Module]`): Modules whose parents run again in their place.
    """
    planned: list[Planned] = []
    images = modules_on_images(model)
    foreign = _foreign_modules(model) | {module: why for module, why in images.items() if why is not None}
    # Their tables are looked up once for all images, of which there are as many as their parents are given
    with_parents = {*with_parents, *(module for module in images if isinstance(module, nn.Embedding))}
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in covered:
            continue
        names, children = _trainable(module), _covered_children(module, with_parents)
        if not (names or children):
            continue
        layer = foreign.get(module) or _layer_for(name, module, names, children, with_parents)
        if isinstance(layer, Layer):
            layer.on_images = module in images
        if isinstance(layer, (RerunLayer, TrainableTokensRule)):
            covered.update(child for _, child in children)
            covered.update(inner for _, inner in _wrappers(module))
            covered.update(child for child in module.children() if child in with_parents)
        planned.append(Planned(name, module, layer))
    followed = {param for entry in planned if isinstance(entry.layer, Layer) for param in entry.layer.params.values()}

    def is_alias(module: nn.Module) -> bool:
        """Whether another layer works with what a module holds."""
        return followed.issuperset(param for param in module.parameters(recurse=False) if param.requires_grad)

    return [entry for entry in planned if isinstance(entry.layer, Layer) or not is_alias(entry.module)]


def plan_layers(model: nn.Module, with_parents: Collection[nn.Module] = ()) -> list[Layer]:
    """
    How each layer that holds trainable parameters is followed. Arguments as for [`plan_modules`].

    Raises:
        ValueError: If some layers don't yield sequence gradients, with their names, reasons and ways out.
    """
    planned = plan_modules(model, with_parents)
    refused = [
        f"`{entry.name or 'the model itself'}` ({type(entry.module).__name__}): {entry.layer}"
        for entry in planned
        if isinstance(entry.layer, str)
    ]
    if refused:
        shown = "\n".join(f"  - {line}" for line in refused[:8])
        more = f"\n  - and {len(refused) - 8} more" if len(refused) > 8 else ""
        foreign = _foreign_modules(model)
        a_rule_helps = any(isinstance(entry.layer, str) and entry.module not in foreign for entry in planned)
        rule = "register a rule for the layer's class (`proma_trl.register_rule`, one small function), or "
        raise ValueError(
            "PROMA needs the gradient of each sequence in a microbatch, and some layers that hold trainable "
            f"parameters don't yield it:\n{shown}{more}\nEither {rule if a_rule_helps else ''}train with "
            f"{ONE_SEQUENCE}, or freeze those parameters."
        )
    return [entry.layer for entry in planned]


def plan_linear_layers(model: nn.Module, head: bool) -> list[Layer]:
    """
    How the layers are followed whose weight is a matrix that they multiply by. Other layers are left to autograd.

    A weight that is also an embedding's is followed in both, or not at all.

    Args:
        model (`nn.Module`): The model.
        head (`bool`): Whether the LM head is among them.
    """
    foreign = {*_foreign_modules(model), *modules_on_images(model)}
    excluded = set() if head else set(head_weights(model))
    layers: list[Layer] = []
    embeddings: dict[nn.Parameter, list[tuple[str, nn.Embedding]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.setdefault(module.weight, []).append((name, module))
        if is_experts(module) and module not in foreign:
            layers.append(ExpertsLayer(name, module))
            continue
        weight = getattr(module, "weight", None)
        if module in foreign or weight in excluded or not (isinstance(weight, nn.Parameter) and weight.requires_grad):
            continue
        rule = linear.rule_if_linear(module)
        if rule is not None:
            layers.append(RuleLayer(name, module, _trainable(module), rule))
    for weight, modules in embeddings.items():
        tied = [layer for layer in layers if any(matrix is weight for matrix in layer.matrices)]
        if tied and any(embedding_refusal(module) for _, module in modules):
            layers = [layer for layer in layers if layer not in tied]
        elif tied:
            layers += [EmbeddingLayer(name, module, ("weight",)) for name, module in modules]
    return layers


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weight of a model's LM head, as far as it is known to have one."""
    base = base_model(model)
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    return [weight] if isinstance(weight, nn.Parameter) else []


def _foreign_modules(model: nn.Module) -> dict[nn.Module, str]:
    """
    Modules whose parameters don't act on one sequence at a time, and why: what PEFT's `ParamWrapper` holds, whose
    weights are multiplied by others; and its virtual prompts, unless each sequence has its own.
    """
    found: dict[nn.Module, str] = {}
    for adapter, encoder in getattr(model, "prompt_encoder", {}).items():
        config = model.peft_config[adapter]
        if config.peft_type not in _PROMPTS_OF_A_SEQUENCE:
            why = f"PEFT (`{type(config).__name__}`) makes virtual tokens once for all sequences of a microbatch"
            found |= dict.fromkeys(encoder.modules(), why)
    for wrapper in model.modules():
        if _is_param_wrapper(wrapper):
            why = f"PEFT's `ParamWrapper` multiplies its weights to change `{wrapper.parameter_name}`"
            adapters = (getattr(wrapper, name) for name in wrapper.adapter_layer_names)
            found |= {module: why for adapter in adapters for module in adapter.modules()}
    return found


def _layer_for(
    name: str,
    module: nn.Module,
    names: tuple[str, ...],
    children: list[tuple[str, nn.Module]],
    with_parents: Collection[nn.Module],
) -> Layer | str:
    """
    How a module with the trainable parameters `names` is followed, together with some of its children, or why it can't
    be.
    """
    if isinstance(module, nn.Embedding):
        refusal = embedding_refusal(module)
        if refusal is None and names != ("weight",):
            refusal = "it holds more than a weight"
        return refusal or EmbeddingLayer(name, module, names)
    if not children:
        rule = rule_for(module)
        if rule is not None:
            return RuleLayer(name, module, names, rule)
        if broadcasts_parameters(module):
            return BroadcastLayer(name, module, names)
        if is_experts(module):
            return ExpertsRule(name, module, names)
        if multiplies_once(module):
            return ProductLayer(name, module, names)
    theirs = tuple(f"{child_name}.{own}" for child_name, child in children for own in _trainable(child))
    if is_trainable_tokens(module):
        return TrainableTokensRule(name, module, (*names, *theirs))
    if _is_large(module, with_parents):
        return f"holds {', '.join(f'`{n}`' for n in names)} and has no rule"
    return RerunLayer(name, module, (*names, *theirs))


def _covered_children(module: nn.Module, with_parents: Collection[nn.Module]) -> list[tuple[str, nn.Module]]:
    """
    The children whose parameters get their gradients where the module runs again: those that it uses without running
    them, or must run again for (`with_parents`), and, where it must run again for parameters of its own, those that
    have neither a rule nor children.
    """
    # Lists of modules never run
    if (
        not any(module.children())
        or isinstance(module, (nn.ModuleList, nn.ModuleDict))
        or _is_large(module, with_parents)
    ):
        return []
    if _is_param_wrapper(module) or _adapts_embedding(module):
        # What one of them does to a parameter is undone where the next one inside runs by itself
        return [
            (f"{prefix}{name}.{path}".rstrip("."), adapter)
            for prefix, wrapper in (_wrappers(module) if _is_param_wrapper(module) else [("", module)])
            for name in wrapper.adapter_layer_names
            for path, adapter in getattr(wrapper, name).named_modules()
            if _trainable(adapter)
        ]
    given_up = [name for name, child in module.named_children() if child in with_parents]
    direct = list(dict.fromkeys([*children_used_directly(module), *given_up]))
    again = bool(direct) or (bool(_trainable(module)) and _has_no_rule(module))
    found = [
        (name, child)
        for name, child in module.named_children()
        if _trainable(child) and (name in direct or (again and not any(child.children()) and _has_no_rule(child)))
    ]
    # What such a child runs has been given what it made of the module's arguments
    inner = ((f"{n}.{path}", part) for n in direct for path, part in module.get_submodule(n).named_modules() if path)
    return [*found, *((path, part) for path, part in inner if _trainable(part) and _has_no_rule(part))]


def _is_param_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's, around one whose parameters it changes by products of its adapters' weights."""
    peft_layers = sys.modules.get("peft.tuners.lora.layer")
    return peft_layers is not None and isinstance(module, peft_layers.ParamWrapper)


def _adapts_embedding(module: nn.Module) -> bool:
    """Whether a module is PEFT's, around an embedding."""
    peft_layers = sys.modules.get("peft.tuners.tuners_utils")
    is_adapted = peft_layers is not None and isinstance(module, peft_layers.BaseTunerLayer)
    return is_adapted and isinstance(module.get_base_layer(), nn.Embedding)


def _wrappers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A wrapper and those directly inside, with what leads to them."""
    prefix = ""
    while _is_param_wrapper(module):
        yield prefix, module
        prefix, module = f"{prefix}base_layer.", module.base_layer


def _is_large(module: nn.Module, with_parents: Collection[nn.Module]) -> bool:
    """Whether a module is a model, or a good part of one, which would be too much to run again."""
    if _adapts_embedding(module):
        return False
    return any(
        isinstance(part, PreTrainedModel) or (isinstance(part, nn.Embedding) and part not in with_parents)
        for part in module.modules()
    )


def _has_no_rule(module: nn.Module) -> bool:
    has_rule = rule_for(module) is not None or broadcasts_parameters(module)
    return not (has_rule or is_experts(module) or multiplies_once(module))


def _trainable(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, param in module.named_parameters(recurse=False) if param.requires_grad)
