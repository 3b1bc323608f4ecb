"""Set-up of a rank before it connects to the others."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.distributed.nccl import set_up_nccl


def test_ranks_trace_collectives_into_the_run_folder_unless_a_user_has_set_another_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "environ", {"NCCL_PROTO": "LL"})
    set_up_nccl(tmp_path, deterministic=False)
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    assert "NCCL_ALGO" not in os.environ
    set_up_nccl(tmp_path / "other", deterministic=True)
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == f"{tmp_path}/nccl-rank-"
    assert (os.environ["NCCL_ALGO"], os.environ["NCCL_PROTO"]) == ("Ring", "LL")


@pytest.mark.slow
def test_rank_may_open_as_many_files_as_a_thousand_ranks_need():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    script = (
        "import resource; from pretrain.distributed.world import raise_file_limit; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard})); "
        "raise_file_limit(1024); print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    limit = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    needed = 2 * (1024 + 3) + 256
    assert limit == (needed if hard == resource.RLIM_INFINITY else min(needed, hard))
