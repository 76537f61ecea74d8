"""The matrix covers what it is for, and its names can be told apart."""

from __future__ import annotations

import pytest
from matrix.attacks import ATTACKS
from matrix.configurations import BOOTS
from matrix.run import choose, main
from matrix.scenario import COMMANDS, Scenario

from pyscan.lab.console import COMMAND_BYTES_MAX
from pyscan.lab.ram import Machine


def test_names_are_unique_and_fit_for_paths() -> None:
    for table in (BOOTS, ATTACKS):
        names = [entry.name for entry in table]
        assert len(set(names)) == len(names)
        assert all(name.replace("-", "").isalnum() for name in names)


def test_everything_varies() -> None:
    assert len(BOOTS) >= 24
    models = {boot.cpu_model.split(",")[0] for boot in BOOTS}
    assert models >= {
        *("max", "qemu64", "Westmere", "Haswell", "Skylake-Server", "Icelake-Server"),
        *("EPYC", "EPYC-Rome", "EPYC-Milan"),
    }
    assert {boot.cpus for boot in BOOTS} == {1, 2, 4}
    assert {boot.machine for boot in BOOTS} == set(Machine)
    assert min(boot.memory_mib for boot in BOOTS) == 384
    assert max(boot.memory_mib for boot in BOOTS) == 6144
    lines = " ".join(boot.append for boot in BOOTS)
    for part in ("nokaslr", "mitigations=off", "spectre_v2=retpoline,lfence", "preempt=full"):
        assert part in lines


def test_every_scenario_is_used_and_can_be_typed() -> None:
    assert {scenario for boot in BOOTS for scenario in boot.scenarios} == set(Scenario)
    assert set(COMMANDS) == set(Scenario)
    for command in (command for commands in COMMANDS.values() for command in commands):
        assert len(command.replace("'", "'\"'\"'")) < COMMAND_BYTES_MAX - 100


def test_unknown_name_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "no-such-boot"])
    message = capsys.readouterr().err
    assert "no-such-boot" in message
    assert BOOTS[0].name in message


def test_choice_keeps_the_order_asked_for() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    chosen = choose(parser, BOOTS, ["retpoline", "max"])
    assert [boot.name for boot in chosen] == ["retpoline", "max"]
    assert choose(parser, BOOTS, []) == BOOTS
