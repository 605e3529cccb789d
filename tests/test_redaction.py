"""Keys are blanked in whatever form they are written, ordinary text stays, and no text takes long."""

from __future__ import annotations

import base64
import random
import string
import subprocess
import time
from pathlib import Path

import pytest

from hpc_cifar.launch import first_words, provenance
from hpc_cifar.redaction import may_name_a_secret, redact, redact_beginning, redact_words

PLANTED = "pl4nted-Secret_Value.77"
FORMS = (
    *('key="{}"', "key='{}'", 'api_key: str = "{}"', "api_key: str | None = '{}'", 'api_key:"{}"', "API_KEY={}", "apiKey: {}"),
    *('{{"token": "{}", "x": 1}}', '{{\\"token\\": \\"{}\\"}}', 'os.environ["HF_TOKEN"] = "{}"', "setenv HF_TOKEN {}"),
    *('os.environ.setdefault("HF_TOKEN", "{}")', "export DB_PASSWORD={}", "--password {}", "--password={}"),
    "--hf-token '{}' -x",
    *("Authorization: Bearer {}", "curl -H 'Authorization: token {}'", "bearer {}", "https://{}@github.com/a/b", "ftp://me:{}@h/x"),
    *("http://me:{}@proxy:3128", "machine api.wandb.ai login user password {}", "machine a\n  login user\n  password {}"),
    *("password {}", "wandb login {}", "curl -u me:{} http://x", "password = (\n+    '{}'\n+)", 'secret = """x\n{}\n"""'),
    *("client_secret: {}", "- token: {}", "passphrase='{}'", "AWS_SECRET_ACCESS_KEY={}"),
    *("PGPASSWORD={} psql", "srun --export=ALL,WANDB_API_KEY={}"),
    *("dbPassword = '{}';", "mysql_pwd={}", "url = 'https://h/x?access_token={}'", 'wandb.login(key="{}")', "credentials: {}"),
    *("private_key = r'{}'", "SLACK_WEBHOOK={}", "token=b'{}'", 'f(token="{}", x=2)', "+DB_PASS: '{}'"),
)  # fmt: skip
BY_THEIR_BEGINNING = (
    *("hf_AbcDefGhiJkl0123456789", "ghp_abcdefghij0123456789", "gho_abcdefghij0123456789", "github_pat_11ABCDEFG0123_abcdef"),
    *("glpat-abcdefghijklmnop12", "sk-proj-abcdef0123456789", "sk-ant-api03-abcdefgh0123", "xoxb-1234567890-abcdefgh"),
    *("xoxp-1234567890-abcdefgh", "AKIAIOSFODNN7EXAMPLE", "wandb_v1_abcDEF0123_4567-89", "pypi-AgEIcHlwaS5vcmcCJD0123456789"),
    *("npm_abcdefghij0123456789abcdefghij012345", "AIzaSyA0123456789abcdefghijklmnopqrstuv", "nvapi-abcdefgh0123456789"),
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N",
)
ORDINARY = (
    *('keyboard = "qwerty"', "tokens_per_second: 1200", "max_tokens=512", "monkey: 5", "tokenizer: bert-base", "token_count=3"),
    *(
        "for key, value in d.items():",
        "sorted(x, key=len)",
        'sorted(x, key="val_accuracy")',
        "key = cache_key(x)",
        "key: value",
    ),
    *(
        'pad_token: "[PAD]"',
        "token = tokenizer.next()",
        'api_key = os.environ["X"]',
        'secretary = "Ann"',
        "password is required",
    ),
    *(
        "def f(password: str | None = None):",
        "password_file=/etc/x",
        "the bearer of good news",
        "bearer certificates",
        "passing: true",
        "--wckey=project1",
    ),
    *(
        "use --token to log in",
        "git@github.com:x/y",
        "ssh://git@github.com/x",
        "sk-learn-intelex-thing",
        "risk-adjusted-returns",
    ),
    *("hf_hub_download_something", "PWD=/home/x", 'primary_key="abc123"', 'if token == "abc":', 'keys: ["a", "b"]', "12:30:45"),
    *(
        "index 0123456789abcdef0123456789abcdef01234567",
        "second_pass = 3",
        "lr=0.1",
        'key=lambda row: row["x"]',
        "basic training",
    ),
    *(
        "https://example.org/a@b",
        "--seed 3",
        "token_embedding = nn.Embedding(10)",
        "author: Ann",
        "compass = 'north'",
        "bypass=1",
    ),
)


@pytest.mark.parametrize("form", FORMS)
def test_a_planted_secret_is_blanked_in_every_form(form: str) -> None:
    end = "\n" if form == "password {}" else " "  # of netrc: a line of its own, else it is prose
    for text in (form.format(PLANTED), f"before\n{form.format(PLANTED)}\nafter", "é" * 300 + end + form.format(PLANTED)):
        assert PLANTED not in redact(text, known=()), redact(text, known=())
        assert "pl4nted" not in redact(text, known=()) and "Value" not in redact(text, known=())
    assert redact(f"before\n{form.format(PLANTED)}\nafter", known=()).startswith("before\n")


@pytest.mark.parametrize("token", BY_THEIR_BEGINNING)
def test_keys_of_known_services_are_blanked_wherever_they_stand(token: str) -> None:
    for text in (token, f"# {token}", f"x={token},y", f'f("{token}")', f"https://h/{token}/x", f"<{token}>"):
        assert token[4:] not in redact(text, known=()), text


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text, known=()) == text
    assert redact(redact(text, known=()), known=()) == text


def test_secrets_of_this_process_are_known_by_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
    monkeypatch.setenv("OLDPWD", "/home/somebody")
    assert redact(f"see {'0123456789abcdef' * 2}01234567 in /home/somebody") == "see *** in /home/somebody"


def test_an_option_and_its_value_in_the_next_word() -> None:
    words = [
        "hpc-cifar",
        "--password",
        PLANTED,
        "--token=" + PLANTED,
        "--seed",
        "3",
        "--set",
        f"api_key={PLANTED}",
        "--token",
        "-x",
    ]
    told = redact_words(words)
    assert PLANTED not in " ".join(told)
    assert [*told[:1], *told[4:6], *told[8:]] == ["hpc-cifar", "--seed", "3", "--token", "-x"]


def test_private_keys_go_as_a_whole_and_in_part() -> None:
    body = "\n".join(base64.b64encode(random.Random(number).randbytes(48)).decode() for number in range(9))
    for text in (
        f"-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{body}",
        body,
    ):
        told = redact(f"x\n{text}", known=())
        assert not [line for line in body.splitlines() if line in told]


@pytest.mark.parametrize("at", [0, 1, 5, 9, 14, 20, 29])
def test_a_cut_leaves_no_half_of_a_secret(at: int) -> None:
    """Of a token that is cut, the rest would be too short to be known as one."""
    token = "hf_AbcDefGhiJkl0123456789xyz"
    for gap in ("\n", " "):
        text = "word " * 200 + gap + token + gap + "more " * 200
        begin = text.index(token)
        told, left_out = redact_beginning(text, begin + at)
        assert left_out and token[:5] not in told
        assert told.startswith("word word")
    told, _ = redact_beginning(f"password = 'correct horse battery staple'\n{'x' * 99}", 30)
    assert "correct" not in told


LONG = (
    *("a", "token", "_key", "://", 'key="', "password ", "login a ", "machine a ", "-----BEGIN PRIVATE KEY-----", '"', "a:"),
    *("eyJ", "token: a[ ", "-", "token=(", ". ", "token='''", "Bearer ", "-u a:", "sk-", "A1a"),
    *("setenv token ", " ", "\\", "x: a"),
)  # fmt: skip


@pytest.mark.parametrize("piece", LONG)
def test_the_time_grows_with_the_text_alone(piece: str) -> None:
    """Twice as much takes about twice as long, whatever is repeated; 256 KiB are kept of a diff."""

    def seconds(size: int) -> float:
        text = (piece * (size // len(piece) + 1))[:size]
        return min(_timed(text) for _ in range(3))

    small, large = seconds(32 << 10), seconds(256 << 10)
    assert large < 2
    assert large < 8 * 4 * small + 0.05


def _timed(text: str) -> float:
    begin = time.process_time()
    redact(text, known=())
    return time.process_time() - begin


def test_random_text_with_secrets_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = random.Random(7)
    for _ in range(500):
        secret = "pl4" + "".join(drawn.choices(string.ascii_letters + string.digits + "-_.+/=", k=24)).rstrip(".=") + "x9"
        noise = "".join(drawn.choices(" \n:=\"'abckey_.-/@", k=30))
        form = drawn.choice(["\nDB_PASSWORD={}\n", '\napi_key = "{}"\n', "\n--password '{}'\n"])
        assert secret not in redact(noise + "\n" + form.format(secret) + noise, known=()), (noise, form)


def _repository(folder: Path) -> Path:
    folder.mkdir()
    (folder / "__init__.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "-f", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(
    "change", ["a" * 40_000 + "\n", "token" * 1_000_000 + "\n", "x = 'ab'\n" * 600_000], ids=["word", "line", "lines"]
)
def test_a_large_change_is_cut_before_it_is_redacted(tmp_path: Path, change: str) -> None:
    package = _repository(tmp_path / "package")
    (package / "__init__.py").write_text(change)
    begin = time.process_time()
    found = provenance.git(package)
    assert time.process_time() - begin < 1.5
    assert found is not None and len(found["diff"]) <= provenance.MAX_DIFF
    assert found["diff_truncated"] == (len(change) > provenance.MAX_DIFF)


def test_a_secret_at_the_cut_of_a_change_is_not_kept_in_half(tmp_path: Path) -> None:
    package = _repository(tmp_path / "package")
    for extra in (-9, -6, -2, 3):
        (package / "__init__.py").write_text("y = 'ab'\n" * 40_000)
        diff = provenance._run(["git", "diff", "HEAD"], package) or ""
        at = diff.rfind("\n", 0, provenance.MAX_DIFF) + 1
        text = diff[diff.index("+y") : at].replace("\n+", "\n")[1:]
        pad = "#" * (provenance.MAX_DIFF - at + extra)
        (package / "__init__.py").write_text(f"{text}{pad}hf_AbcDefGhiJkl0123456789xyz\n" + "z = 1\n" * 9000)
        found = provenance.git(package)
        assert found is not None and found["diff_truncated"] and "hf_Abc" not in found["diff"]


def test_words_of_a_log_are_redacted_before_they_are_shortened() -> None:
    line = "Error: key=" + "A" * 2380 + " hf_AbcDefGhiJkl0123456789xyz end"
    for cut in range(2360, 2430):
        assert "hf_Abc" not in first_words.one_line(line[: cut + 30])


NAMES = (
    *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASS", "MYSQL_PWD", "PGPASSWORD"),
    *("GITHUB_PAT", "DATABASE_PASSWORD"),
    *("SSH_PRIVATE_KEY", "CLIENT_SECRET", "AZURE_STORAGE_CONNECTION_STRING", "KAGGLE_KEY", "COMET_API_KEY", "hf_token"),
    *("PASSPHRASE", "SENTRY_DSN", "DOCKER_AUTH", "NGC_APIKEY", "NEPTUNE_API_TOKEN", "SECRET_KEY_BASE", "OPENAI_API_KEY"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "SLACK_WEBHOOK", "ENCRYPTION_KEY", "githubToken", "MLFLOW_TRACKING_PASSWORD"),
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_usual_names_of_secrets(name: str) -> None:
    assert may_name_a_secret(name)


@pytest.mark.parametrize(
    "name", ["OMP_NUM_THREADS", "KEYBOARD", "PWD", "OLDPWD", "SSH_AUTH_SOCK", "PATH", "TOKENIZERS_PARALLELISM", "COMPASS"]
)
def test_usual_names_of_other_variables(name: str) -> None:
    assert not may_name_a_secret(name)
