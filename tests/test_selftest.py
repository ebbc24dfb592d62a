"""The self-test passes here, and fails where an op is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coachhook import ops
from coachhook.cli import main
from coachhook.selftest import selftest


def test_every_available_implementation_is_right():
    checks = selftest()
    assert {c.op for c in checks} >= {
        "hooked_linear",
        "cholesky_update_",
        "cholesky_downdate_",
        "cholesky_update_solve_",
        "gram_update_",
    }
    assert {c.backend for c in checks} >= {"reference", "cpu"}
    wrong = [c for c in checks if not c.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("fault", ["value", "shape", "nan", "raise"])
def test_a_wrong_op_is_seen(monkeypatch, capsys, fault):
    right = ops.hooked_linear

    def wrong(*args, backend, **kwargs):
        y, z = right(*args, backend=backend, **kwargs)
        if backend != "cpu":
            return y, z
        if fault == "raise":
            raise RuntimeError("no kernel image")
        if fault == "value":
            y[0, 3] += 1
        if fault == "nan":
            z[0, 3] = float("nan")
        return (y[:, 1:] if fault == "shape" else y), z

    monkeypatch.setattr(ops, "hooked_linear", wrong)
    checks = selftest()
    assert {c.ok for c in checks if c.op == "hooked_linear" and c.backend == "cpu"} == {False}
    assert all(c.ok for c in checks if c.op != "hooked_linear" or c.backend != "cpu")
    assert main(["doctor", "--selftest"]) == 1
    out = capsys.readouterr().out
    assert "checks failed" in out
    assert ("no kernel image" in out) == (fault == "raise")


def test_a_cue_taken_for_seen_at_its_first_token_is_seen(monkeypatch):
    right = ops.hooked_linear

    def wrong(*args, backend, scope, **kwargs):
        if backend == "cpu" and isinstance(scope, ops.Membership):
            scope = replace(scope, gaps=None)
        return right(*args, backend=backend, scope=scope, **kwargs)

    monkeypatch.setattr(ops, "hooked_linear", wrong)
    bad = [c for c in selftest() if not c.ok]
    assert {(c.backend, c.case) for c in bad} == {
        ("cpu", "membership with cues of two tokens, pair")
    }
    assert len(bad) == 2  # dtypes
