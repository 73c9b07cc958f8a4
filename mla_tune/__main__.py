"""`python -m mla_tune`, which launchers start too: `torchrun … -m mla_tune train …`."""

from __future__ import annotations

import os

from mla_tune.cli.app import main

if __name__ == "__main__":
    try:
        main()
    except SystemExit as leaving:  # typer raises it after success, too
        if "RANK" in os.environ and not leaving.code:
            from mla_tune.training.distributed.launch import exit_worker

            exit_worker()
        raise
