"""Names and layout of a model's tensors in published files, by transformers' own conversions.

In memory transformers stacks the experts of a block; most families' files hold one tensor per
expert and matrix. `core_model_loading` has the conversions of every family, in both directions.
Here they are applied to a few tensors at a time: those that one conversion needs together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from dmoe.config.errors import CheckpointError
from dmoe.hf.adapters import is_unread
from dmoe.hf.published import BLOCKS, SCALES, PublishedDirectory


class DiskFormat:
    """Converts tensors of one model to those of the files of its source.

    Attributes:
        known: the name in memory that each tensor of the source is read into, by its name there.
        unknown: tensors of the source that the class does not know, such as layers of
            multi-token prediction: transformers leaves them out when it loads.
    """

    def __init__(self, model: Any, source: PublishedDirectory) -> None:
        """Find out which conversions loading the source uses.

        Args:
            model: of transformers; may be on the meta device, and in any expert sharding.
            source: the directory whose format is meant.

        Raises:
            CheckpointError: the source lacks a tensor of the model.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )

        self.model, self.source = model, source
        state = model.state_dict(keep_vars=True)
        every = get_model_conversion_mapping(model)
        renamings = [one for one in every if isinstance(one, WeightRenaming)]
        converters = [one for one in every if isinstance(one, WeightConverter)]
        self.known, self.unknown = {}, []
        for stored in source.tensors:
            # the codes of MXFP4 are at another name than the weights that they stand for
            name = stored.removesuffix(BLOCKS) if source.quantized else stored
            prefix = model.base_model_prefix
            target, _ = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:  # it has the model's own name already
                target = name
            if target in state and not is_unread(model, name):
                self.known[name] = target
            else:
                self.unknown.append(stored)
        if source.quantized:
            # scales belong to the weights beside them, and are gone once these are dequantized
            self.unknown = [name for name in self.unknown if not name.endswith(SCALES)]
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        if lacking := sorted(state.keys() - {*self.known.values()} - tied):
            why = "has no tensor for it, so that it cannot be exported in the source's format"
            raise CheckpointError(f"{source.folder}: {lacking[0]}: {why}")
        self._used = [one for one in every if one.was_used()]
        reverse = [one.reverse_transform() for one in self._used[::-1]]
        self._reverse_converters = [one for one in reverse if isinstance(one, WeightConverter)]

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """Return the names in memory, in their order, grouped by the conversion they need."""
        from transformers.core_model_loading import apply_converters

        found: dict[tuple[bool, str], list[str]] = {}
        for name in names:
            target, pattern = apply_converters(name, self._reverse_converters)
            found.setdefault((pattern is None, target), []).append(name)
        return list(found.values())

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return one group's tensors as the files hold them, by their names there.

        Views of the given tensors where the conversion allows it.
        """
        from transformers.core_model_loading import revert_weight_conversion

        before = vars(self.model).get("_weight_conversions")
        self.model._weight_conversions = self._used or None
        if not self._used:
            return dict(tensors)
        try:
            reverted: dict[str, Tensor] = revert_weight_conversion(self.model, dict(tensors))
        finally:
            self.model._weight_conversions = before
        return reverted
