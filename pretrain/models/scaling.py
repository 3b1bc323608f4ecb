"""Maximal update parametrization: first values and learning rates of a model from those of a narrower one.

    base model, whose rates are known  ─ shapes and first values ┐
    wider model of the same family     ─ shapes                  ┴▶ ParameterScale of each parameter

With r = inputs of a matrix / inputs of it in the base (Yang et al. 2022, arXiv:2203.03466, tables 3 and 8):

    parameter                               first values       Adam's rate    Muon's rate, of matrices within blocks
    tables, vectors, biases                 base               1
    matrices                                base / sqrt(r)     1 / r          see `_muon_rate`
    matrix of an untied head                base / r           1 / r
    norm before a head tied to a table      base / r           1 / r

The forward pass is that of the standard parametrization. The paper multiplies the logits of a tied head by 1 / r. Here
the gain of the norm before the head begins at 1 / r, and has the rate of this size. Under Adam both train alike (lemma
J.1 of the paper). At the widths of the base, all values and rates are those without scaling. Multipliers of rates that
a family declares (`ByteModel.rate_multiplier`) are those of the base too, because H-Net's follow from its widths.
"""

import math
from dataclasses import replace

from torch import Tensor, nn

from byteloom.core.errors import CorrectableError
from pretrain.models.base import ByteModel
from pretrain.models.blocks.mamba2 import Mamba2
from pretrain.models.blocks.multi_byte import MultiByteHeads
from pretrain.models.initial import ParameterScale


class ScalingError(CorrectableError):
    """A model cannot be scaled from a base model."""


def scales(model: ByteModel, base: ByteModel) -> dict[str, ParameterScale]:
    """Return the scale of each parameter of a model, by name.

    Args:
        model: of any device.
        base: a model of the same family and depth, whose widths may differ.

    Raises:
        ScalingError: other sizes than widths differ, or a tied head has no norm before it.
    """
    _check_alike(model, base)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head, base_parameters, fused = _head(model), dict(base.named_parameters()), model.fused_matrices()
    factors, base_factors = model.table_factors(), base.table_factors()
    found = {}
    for name, parameter in model.named_parameters():
        initial, of_base = base.initial(name), base_parameters[name]
        if parameter is head and id(parameter) not in tables:
            ratio = parameter.shape[1] / of_base.shape[1]
            found[name] = ParameterScale(initial.times(1 / ratio), 1 / ratio)
        elif id(parameter) in matrices:
            ratio = parameter.shape[1] / of_base.shape[1]
            found[name] = ParameterScale(
                initial.times(ratio**-0.5), 1 / ratio, _muon_rate(parameter, of_base, fused.get(name, 1))
            )
        else:
            factor = factors.get(name, 1.0) / base_factors.get(name, 1.0)
            found[name] = ParameterScale(initial.times(1 / factor), 1 / factor)
    if id(head) in tables:
        found |= _before_tied_head(model, base, head, factors, base_factors)
    return {name: replace(scale, multiplier=base.rate_multiplier(name)) for name, scale in found.items()}


def _check_alike(model: ByteModel, base: ByteModel) -> None:
    """Raise ScalingError if models differ in more than widths or in the widths of heads, or have further heads."""
    if any(isinstance(module, MultiByteHeads) for module in model.modules()):
        raise ScalingError("optimizer.scaling mup has no rates for the heads of model.multi_byte; set that to null")
    shapes, base_shapes = ({name: p.shape for name, p in each.named_parameters()} for each in (model, base))
    if differing := sorted(shapes.keys() ^ base_shapes.keys()):
        raise ScalingError(f"the base model of optimizer.base differs in {differing[0]}; it may change widths alone")
    widths, base_widths = (
        {path: module.head_width for path, module in each.named_modules() if hasattr(module, "head_width")}
        for each in (model, base)
    )
    for path, width in widths.items():
        if width != base_widths[path]:
            raise ScalingError(
                f"heads of {path} have {width} channels, and {base_widths[path]} in the base model of optimizer.base; "
                "the products of queries and keys would grow; give both the same, by their numbers of heads"
            )
    for (path, layer), of_base in zip(model.named_modules(), base.modules(), strict=True):
        if isinstance(layer, Mamba2) and isinstance(of_base, Mamba2) and layer.state != of_base.state:
            raise ScalingError(
                f"the state of {path} has {layer.state} numbers a channel, and {of_base.state} in the base model of "
                "optimizer.base; what is read of it would grow; give both the same"
            )


def _head(model: ByteModel) -> Tensor:
    """Return the parameter that holds the weight of the head, of which the head may be a part."""
    weight, _ = model.head_weights()
    return weight if weight._base is None else weight._base


def _muon_rate(parameter: Tensor, of_base: Tensor, fused: int) -> float:
    """Return the factor with which Muon's updates have spectral norms of about sqrt(outputs / inputs).

    That is the condition of Yang, Simon and Bernstein 2023 (arXiv:2310.17813). Muon's own step has a spectral norm of
    sqrt(max(outputs, inputs)) learning rates, see `Muon`.

    Args:
        parameter: of the model.
        of_base: the same parameter of the base.
        fused: logical matrices of equal rows that both hold. Each has an update of its own.
    """

    def wanted(matrix: Tensor) -> float:
        outputs, inputs = matrix.shape[0] / fused, matrix.shape[1]
        return math.sqrt(outputs / inputs) / math.sqrt(max(outputs, inputs))

    return wanted(parameter) / wanted(of_base)


def _before_tied_head(
    model: ByteModel,
    base: ByteModel,
    head: Tensor,
    factors: dict[str, float],
    base_factors: dict[str, float],
) -> dict[str, ParameterScale]:
    """Return the scales of the norm that divides what a tied head reads."""
    if (norm := model.head_norm()) is None:
        raise ScalingError(
            "optimizer.scaling mup scales what a tied head reads by the norm before it, and this "
            f"{type(model).__name__} has none; set optimizer.scaling to standard, or choose a model with such a norm"
        )
    (path,) = (path for path, module in model.named_modules() if module is norm)
    (name,) = (name for name, parameter in model.named_parameters() if parameter is head)
    width, base_width = head.shape[1], dict(base.named_parameters())[name].shape[1]
    ratio = width / base_width / (factors.get(name, 1.0) / base_factors.get(name, 1.0))
    return {
        f"{path}.{parameter}": ParameterScale(base.initial(f"{path}.{parameter}").times(1 / ratio), 1 / ratio)
        for parameter, _ in norm.named_parameters()
    }
