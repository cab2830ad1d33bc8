"""What the interpreter needs less of than a GPU."""

from collections.abc import Iterator

import pytest

from ssd_torchrec.ops import ssd_carry
from ssd_torchrec.ops.launch import INTERPRETED


@pytest.fixture(autouse=True, scope="session")
def few_pieces_are_scanned_at_once() -> Iterator[None]:
    """In the interpreter: there three pieces are to take two goes, and a scan is a loop over all it might hold."""
    with pytest.MonkeyPatch.context() as changed:
        if INTERPRETED:
            changed.setattr(ssd_carry, "PIECES_AT_ONCE", 2)
        yield
