"""Configuration files: what is accepted, and that every error names file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyscan.config import (
    AgentConfig,
    ControlConfig,
    MonitorConfig,
    load_agent,
    load_control,
    load_monitor,
)
from pyscan.errors import ConfigError, ExitStatus
from pyscan.keys import SigningKey
from pyscan.records import Action
from pyscan.trust import Role
from pyscan.trust.authority import Authority
from pyscan.validate.rules import Rule, StateRules
from pyscan.validate.vector import StateClass

COMMON = """\
[identity]
name = "one"
key = "own.key"

[mqtt]
username = "one"
password_file = "password"

[state]
directory = "state"
"""
AGENT = (
    COMMON
    + """
[trust]
controls.ctl-1 = "peer.pub"

[limits]
kills_per_minute = 3
protected = ["web-2"]

[[vm]]
id = "web-1"
qmp = "/run/web-1.qmp"

[[vm]]
id = "web-2"
qmp = "/run/web-2.qmp"
pidfile = "web-2.pid"
"""
)
CONTROL = (
    COMMON
    + """
[trust.monitors]
mon-1 = "peer.pub"

[trust.agents]
host-1 = "peer.pub"

[policy]
enforce = true
unapproved = "kill"
"""
)
MONITOR = (
    COMMON
    + """
[trust]
approvers = [
    "peer.pub",
]

[sweep]
interval_ms = 250

[kernel_state]
ftrace = "forbid"
static_key = "report"

[[kernel_state.rule]]
class = "kprobe"
name = "vfs_*"
rule = "allow"

[[kernel_state.rule]]
class = "static-key"
name = "ext4:*"
rule = "pin"

[[target]]
name = "web-1"
host = "host-1"
vm = "web-1"
source = "qemu:/run/web-1.qmp"
approved = "web-1.approved"
"""
)


KEY_SET = 'root = "peer.pub"\nset = "none.cose"'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SigningKey.generate().save(tmp_path / "own.key")
    SigningKey.generate().public.save(tmp_path / "peer.pub")
    (tmp_path / "password").touch(0o600)
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "web-1.approved").write_bytes(b"")
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "program.toml"
    path.write_text(text)
    return path


def line_of(text: str, needle: str) -> int:
    return text[: text.index(needle)].count("\n") + 1


def test_agent(folder: Path) -> None:
    config = load_agent(write(folder, AGENT))
    assert isinstance(config, AgentConfig)
    assert config.identity.key.key_id == SigningKey.load(folder / "own.key").key_id
    assert config.state.database == folder / "state" / "state.sqlite"
    assert [vm.id for vm in config.vm] == ["web-1", "web-2"]
    assert config.vm[1].pidfile == folder / "web-2.pid"
    settings = config.link_settings("agent")
    assert (settings.identity, settings.username, settings.password) == (
        "pyscan-agent-one",
        "one",
        "secret",
    )
    assert "secret" not in repr(config)


def test_control(folder: Path) -> None:
    config = load_control(write(folder, CONTROL))
    assert isinstance(config, ControlConfig)
    assert config.policy.enforce
    assert config.policy.unapproved is Action.KILL
    assert config.policy.undecided is None


def test_control_observes_unless_told_otherwise(folder: Path) -> None:
    config = load_control(write(folder, CONTROL.replace("enforce = true\n", "")))
    assert not config.policy.enforce


def test_monitor(folder: Path) -> None:
    config = load_monitor(write(folder, MONITOR))
    assert isinstance(config, MonitorConfig)
    assert config.sweep.interval_ms == 250
    assert config.target[0].approved == (folder / "web-1.approved",)
    assert len(config.trust.approvers) == 1


def test_several_approved_configurations(folder: Path) -> None:
    text = MONITOR.replace('"web-1.approved"', '["web-1.approved", "web-1.approved"]')
    config = load_monitor(write(folder, text))
    assert config.target[0].approved == (folder / "web-1.approved",) * 2
    with pytest.raises(ConfigError, match="approved"):
        load_monitor(write(folder, MONITOR.replace('"web-1.approved"', "[]")))


def test_rules_for_the_state_of_a_kernel(folder: Path) -> None:
    rules = load_monitor(write(folder, MONITOR)).kernel_state.rules()
    assert (rules.ftrace, rules.static_key, rules.bpf) == (Rule.FORBID, Rule.REPORT, Rule.REPORT)
    assert rules.rule_for(StateClass.KPROBE, "vfs_read") is Rule.ALLOW
    assert rules.rule_for(StateClass.KPROBE, "do_exit") is Rule.REPORT
    assert rules.rule_for(StateClass.STATIC_KEY, "ext4:key") is Rule.PIN
    assert rules.rule_for(StateClass.FEATURES, "uniprocessor") is Rule.REPORT
    plain = MONITOR[: MONITOR.index("[kernel_state]")] + MONITOR[MONITOR.index("[[target]]") :]
    assert load_monitor(write(folder, plain)).kernel_state.rules() == StateRules()


Load = Callable[[Path], object]
Bad = tuple[Load, str, str, str, str, str]

#: loader, valid text, what is replaced, by what, the text whose line is named, part of the message
BAD: list[Bad] = [
    (load_agent, AGENT, 'name = "one"', "name = one", "name = one", "not TOML"),
    (load_agent, AGENT, 'name = "one"', "name = 1", "name = 1", "Expected `str`"),
    (load_agent, AGENT, 'name = "one"', 'name = "a/b"', 'name = "a/b"', "regex"),
    (load_agent, AGENT, 'name = "one"', 'name = "#"', 'name = "#"', "regex"),
    (load_agent, AGENT, 'name = "one"\n', "", "[identity]", "missing required field `name`"),
    (load_agent, AGENT, '"own.key"', '"none.key"', 'key = "none.key"', "none.key"),
    (load_agent, AGENT, '"own.key"', '"peer.pub"', 'key = "peer.pub"', "peer.pub"),
    (load_agent, AGENT, '"own.key"', "7", "key = 7", "Expected a path"),
    (load_agent, AGENT, '"password"', '"none"', "password_file", "cannot be read"),
    (load_agent, AGENT, 'username = "one"\n', "", "[mqtt]", "needs a username"),
    (load_agent, AGENT, 'username = "one"', "port = 0", "port = 0", "port"),
    (load_agent, AGENT, 'username = "one"', 'user = "one"', 'user = "one"', "unknown field"),
    (load_agent, AGENT, "kills_per_minute = 3", "kills_per_minute = -1", "kills_per", ">= 0"),
    (load_agent, AGENT, '["web-2"]', '["web-9"]', "protected", "web-9"),
    (load_agent, AGENT, 'id = "web-2"', 'id = "web-1"', "", "web-1"),
    (load_agent, AGENT, '"/run/web-2.qmp"', '"/run/web-1.qmp"', "", "more than once"),
    (load_agent, AGENT, 'pidfile = "web-2.pid"', "pidfile = 3", "pidfile = 3", "path"),
    (load_agent, AGENT, 'id = "web-2"', 'id = "web 2"', 'id = "web 2"', "regex"),
    (load_agent, AGENT, 'controls.ctl-1 = "peer.pub"', "", "[trust]", "controls is empty"),
    (load_agent, AGENT, '= "peer.pub"', '= "own.key"', "controls.ctl-1", "own.key"),
    (load_agent, AGENT, "[state]", "[state]\n[state]", "[state]\ndir", "not TOML"),
    (load_agent, AGENT, "[limits]", "[sandbox]\ndisk_iops = 0\n[limits]", "disk_iops", ">= 1"),
    (load_agent, AGENT, "[limits]", '[sandbox]\nrevoke = ["x"]\n[limits]', "", "absolute"),
    (load_agent, AGENT, "[limits]", '[discovery]\nqmp = "x"\n[limits]', "", "absolute paths"),
    (load_agent, AGENT, "[limits]", "[discovery]\ninterval_s = 0\n[limits]", "", ">= 0.1"),
    (load_agent, AGENT, 'pidfile = "web-2.pid"', "hub = 1", "", "come together"),
    (load_agent, AGENT, "[limits]", '[limits]\ntwo_person = ["burn"]', "two_person", "burn"),
    (load_agent, AGENT, "[trust]", '[trust]\nroot = "peer.pub"', "[trust]", "come together"),
    (load_agent, AGENT, "[trust]", f"[trust]\n{KEY_SET}", "set =", "none.cose: cannot be read"),
    (load_agent, AGENT, "[state]", 'crl = "password"\n[state]', "[mqtt]", "need ca"),
    (load_agent, AGENT, "[state]", 'key = "peer.pub"\n[state]', 'key = "peer', "chmod 600"),
    (load_agent, COMMON, "", "", "", "vm"),
    (load_control, CONTROL, '"kill"', '"explode"', "unapproved", "explode"),
    (load_control, CONTROL, '"kill"', '"release"', "[policy]", "no answer"),
    (load_control, CONTROL, "enforce = true", "enforce = 1", "enforce = 1", "bool"),
    (load_control, CONTROL, "[trust.monitors]", "[trust.controls]", "", "monitors is empty"),
    (
        load_control,
        CONTROL,
        'host-1 = "peer.pub"',
        'host-1 = "peer.pub"\nhost-2 = "peer.pub"',
        "[trust.monitors]",  # where [trust] begins
        "same key",
    ),
    (load_monitor, MONITOR, "interval_ms = 250", "interval_ms = 0", "interval_ms = 0", ">= 1"),
    (load_monitor, MONITOR, "interval_ms = 250", 'digest = "md5"', 'digest = "md5"', "nh4aes or"),
    (load_monitor, MONITOR, "interval_ms = 250", 'backend = "md5"', 'backend = "md5"', "numba"),
    (load_monitor, MONITOR, '"web-1.approved"', '"none"', 'approved = "none"', "no readable"),
    (load_monitor, MONITOR, '    "peer.pub",\n', "", "approvers", "approvers is empty"),
    (load_monitor, MONITOR, '"forbid"', '"deny"', 'ftrace = "deny"', "Invalid enum value 'deny'"),
    (load_monitor, MONITOR, 'ftrace = "forbid"', 'tracer = "pin"', 'tracer = "pin"', "unknown"),
    (load_monitor, MONITOR, '"vfs_*"', '""', 'name = ""', "length >= 1"),
    (load_monitor, MONITOR, '"kprobe"', '"probe"', 'class = "probe"', "'probe'"),
    (
        load_monitor,
        MONITOR,
        'rule = "pin"',
        "",
        '[[kernel_state.rule]]\nclass = "static-key"',
        "field `rule`",
    ),
    (
        load_monitor,
        MONITOR,
        '"kprobe"',
        '"unknown-module"',
        "[[kernel_state.rule]]",
        "always a finding",
    ),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0].__name__}-{case[3] or case[5]}")
def test_error_names_file_and_line(folder: Path, case: Bad) -> None:
    load, text, old, new, where, message = case
    assert old in text
    bad = text.replace(old, new, 1)
    path = write(folder, bad)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.exit_status == ExitStatus.USAGE
    assert caught.value.line == (line_of(bad, where) if where else caught.value.line)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_set_instead_of_pinned_keys(folder: Path) -> None:
    authority = Authority.create(folder / "root", "test")
    bundle = authority.issue(Role.OPERATOR, "ann", folder / "ann")
    assert bundle.private_key is not None
    table = 'root = "root/root.pub"\nset = "root/trust.cose"'
    config = load_agent(write(folder, AGENT.replace('controls.ctl-1 = "peer.pub"', table)))
    ring = config.keeper().ring(Role.CONTROL, Role.OPERATOR)
    assert ring.get(SigningKey.load(bundle.private_key).key_id)[0] == "ann"
    assert not (folder / "state").exists()  # checking a configuration writes nothing


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_password_that_others_reach_is_refused(folder: Path, mode: int) -> None:
    (folder / "password").chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_agent(write(folder, AGENT))


@pytest.mark.parametrize("content", [b"", b"\nsecond", b"\xff\n", b"x" * 2000])
def test_password_must_be_one_line_of_ascii(folder: Path, content: bytes) -> None:
    (folder / "password").write_bytes(content)
    with pytest.raises(ConfigError, match="first line") as caught:
        load_agent(write(folder, AGENT))
    assert caught.value.line == line_of(AGENT, "password_file")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_agent(tmp_path / "none.toml")


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'[identity]\nname = "\xff"\n')
    with pytest.raises(ConfigError, match="UTF-8") as caught:
        load_agent(path)
    assert caught.value.line == 2


def test_huge_file(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(ConfigError, match="larger than"):
        load_agent(path)


@given(text=st.text(st.sampled_from("[]=.\"'#ab1{}\n ,-_"), max_size=60))
def test_any_text_loads_or_is_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_agent(path)
