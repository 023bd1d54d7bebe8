"""Keys of tensors as a directory has them: one family's files have several forms.

Releases, files that transformers 5 converted, and multimodal models name the same tensors
differently, and experts of a layer can be fused into two tensors.
"""

import dataclasses
from collections.abc import Callable, Iterable

from eep_jax.model_config import ModelConfig
from eep_jax.models.families.tensors import Family, Stored

# Where a model's own keys begin, and what stands there in the files of models with a text part.
_PREFIXES = (("", ""), ("model.", "model.language_model."), ("", "language_model."))


@dataclasses.dataclass(frozen=True)
class Keys:
    """The form of the keys of one directory.

    Args:
        prefix: Beginning of the family's keys, and of those in the files.
        renamed: Further parts of the family's keys, and what the files have instead.
        fused: Which of `Family.fused` the experts have; None: each has tensors of its own.
    """

    prefix: tuple[str, str] = ("", "")
    renamed: tuple[tuple[str, str], ...] = ()
    fused: int | None = None

    def of(self, stored: Stored) -> Stored:
        """The tensor under the key that the files have.

        >>> Keys(prefix=("", "language_model.")).of(Stored("lm_head.weight", (8, 4))).key
        'language_model.lm_head.weight'
        """
        key = stored.key
        for old, new in self.renamed:
            key = key.replace(old, new)
        old, new = self.prefix
        if key.startswith(old):
            key = new + key[len(old) :]
        return dataclasses.replace(stored, key=key)


def find_keys(
    family: Family,
    model: ModelConfig,
    dense: Iterable[Stored],
    shape_of: Callable[[str], tuple[int, ...] | None],
) -> Keys:
    """The form that fits the files.

    Args:
        family: Their family.
        model: Its sizes.
        dense: The tensors outside the experts: most of them decide.
        shape_of: The shape of a tensor in the files; None for an unknown key.

    Returns:
        The family's own form if none fits better.
    """
    tensors, renamings = list(dense), dict.fromkeys(((), family.renamed))
    forms = [Keys(prefix, renamed) for prefix in _PREFIXES for renamed in renamings]
    found = lambda keys: sum(shape_of(keys.of(stored).key) is not None for stored in tensors)
    best, shapes = max(forms, key=found), []
    for number, fused in enumerate(family.fused):
        parts = [best.of(part.stored) for part in fused(model, 0)]
        shapes.append([(shape_of(stored.key), stored.shape) for stored in parts])
        if all(there == expected for there, expected in shapes[-1]):
            return dataclasses.replace(best, fused=number)
    if any(there for form in shapes for there, _ in form):
        return dataclasses.replace(best, fused=0)  # whose shapes the error will name
    return best
