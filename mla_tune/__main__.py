"""`python -m mla_tune`, and what launchers start: `torchrun … -m mla_tune train …`."""

from __future__ import annotations

import os

from mla_tune.cli.app import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as leaving:  # typer leaves so when all went well, too
        if "RANK" in os.environ and not leaving.code:
            from mla_tune.training.distributed.launch import exit_worker

            exit_worker()
        raise
