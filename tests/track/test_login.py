"""Whether runs go to W&B from here: what the job file wants, the variable, and whether there is a login."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_cifar.track import wandb_run


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def netrc(home: Path, host: str) -> None:
    (home / ".netrc").write_text(f"machine {host}\n  login user\n  password {'0' * 40}\n")


@pytest.mark.parametrize(
    ("wanted", "variable", "login", "found"),
    [
        ("disabled", None, True, "disabled"),
        ("disabled", "online", True, "disabled"),
        ("offline", None, True, "offline"),
        ("online", None, True, "online"),
        ("online", None, False, "offline"),
        ("online", "offline", True, "offline"),
        ("online", "disabled", True, "disabled"),
        ("online", "", True, "disabled"),
        ("offline", "online", True, "online"),
    ],
)
def test_the_mode(
    home: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, variable: str | None, login: bool, found: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    if login:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    said: list[str] = []
    assert wandb_run.mode(wanted, said.append) == found
    assert bool(said) == (not login), "a missing login is told, with what to do"


@pytest.mark.parametrize("host", ["api.wandb.ai", "api.forge.coreweave.com"])
def test_a_login_at_the_clients_own_hosts(home: Path, host: str) -> None:
    assert not wandb_run.has_login()
    netrc(home, host)
    assert wandb_run.has_login()


def test_a_login_at_a_host_of_ones_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc(home, "wandb.site:8080")
    assert not wandb_run.has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.site:8080")
    assert wandb_run.has_login()
    monkeypatch.delenv("WANDB_BASE_URL")
    settings = home / ".config" / "wandb" / "settings"
    settings.parent.mkdir(parents=True)
    settings.write_text("[default]\nbase_url = http://wandb.site:8080\n")
    assert wandb_run.has_login()
    settings.write_text("no settings")
    assert not wandb_run.has_login()


def test_no_home_folder_at_all(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    netrc(home, "api.wandb.ai")
    monkeypatch.setattr(Path, "home", nowhere)
    assert not wandb_run.has_login()
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    assert wandb_run.has_login()
