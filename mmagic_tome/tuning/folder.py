# Copyright (c) mmagic_tome authors. Licensed under the Apache License 2.0.
"""The folder of a search: everything that was done, so that none of it is done twice.

::

    manifest.json           what all of it depends on: an evaluation's, and the search's own
    pictures/dense/         dense pictures of the search's prompts
    trace.json              timesteps of a run
    rounds.json             what the clock said of the parts of the network, and on which machine
    costs.json              what they cost, from that
    trials.json             every candidate that was tried
    checks.json             runs on the prompts that the search did not see, and on which machine
    pareto.png, result.json what came out
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import ToMeError
from ..evaluation.store import RunFolder, readable_io_errors

KEPT = ("trace.json", "rounds.json", "costs.json", "trials.json", "checks.json")
RESULTS = ("result.json", "pareto.png")


class SearchFolder(RunFolder):
    """Files of one search. Trials and the rest are kept under keys, see :func:`key_of`."""

    def clear(self) -> None:
        super().clear()
        for name in (*KEPT, *RESULTS):
            (self.path / name).unlink(missing_ok=True)

    def kept(self, name: str) -> dict[str, Any]:
        """What a file holds; an empty dict if there is none.

        Raises:
            ToMeError: it cannot be read.
        """
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ToMeError(f"cannot read {self.path / name}: {error}; remove it") from None

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Write a file whole."""
        with readable_io_errors(self.path):
            self._files().save_json(name, value)


def key_of(options: dict[str, Any], steps: int | None = None) -> str:
    """One name for options of token merging, and other steps than the request's."""
    return json.dumps({**options, **({"steps": steps} if steps else {})}, sort_keys=True)
