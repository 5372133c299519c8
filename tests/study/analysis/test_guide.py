"""What `docs/guide/claims.md` shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import yaml

from flanmoe.study.analysis.claims import Claim

_GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "claims.md").read_text(encoding="utf-8")


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", _GUIDE, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_claims_are_claims() -> None:
    claims = [Claim.parse(one) for one in yaml.safe_load(_block("yaml"))["claims"]]
    assert len(claims) == 4
    assert claims[0].contrast({}).weights["switch-direct"] == -0.5
    assert set(claims[0].requires) == {"flops_per_token"}


def test_the_code_runs(capsys: Any) -> None:
    scores = [
        (arm, seed, str(i), float((i * 7 + seed + (arm == "sparse")) % 5 > 1))
        for arm in ("dense", "sparse")
        for seed in range(3)
        for i in range(40)
    ]
    exec(_block("python"), {"scores": scores})
    assert "underpowered No evidence either way." in capsys.readouterr().out
