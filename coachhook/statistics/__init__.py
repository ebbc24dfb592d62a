"""Statistics of the frozen model: how its keys are distributed over ordinary text.

A key is the input of an editable down-projection for one token. The uncentred second moment of
the keys, ``Cov = (1 / N) sum_t k_t k_t^T``, is the prior that keeps unrelated text as it was when
facts are edited (Meng et al. 2022, ROME, section 3.1, and MEMIT).
"""

from __future__ import annotations

from coachhook.statistics.collect import collect_statistics
from coachhook.statistics.container import Statistics
from coachhook.statistics.texts import read_texts

__all__ = ["Statistics", "collect_statistics", "read_texts"]
