"""What a run remembers of its surroundings, and which tensors of PyTorch and NumPy become elements."""

from __future__ import annotations

import argparse
import json
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import smdbg
from smdbg.hooks.convert import to_elements
from smdbg.hooks.facts import HIDDEN, hyperparameters, is_secret, plain, redact_argv, redact_text, seed

SECRET = """
password passwd pwd PWD DB_PASSWORD passWord PassPhrase passphrase password2 db_pass user.password secret secrets
secret_key aws_secret_key AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID client_secret client_secret_value clientSecret
credential credentials aws.credentials authorization Authorization Proxy-Authorization auth auth_header auth.user
server.auth basic_auth apikey APIKEY api_key api-key apiKey APIKey ApiKey wandb_api_key X-Api-Key OPENAI_API_KEY
api_keys private_key access_key encryption_key ssh_key OPENAI_KEY WANDB_KEY AZURE_OPENAI_KEY openai_key
token TOKEN --token access_token accessToken auth_token api_token bearer_token session_token refresh_token id_token
hf_token HF_TOKEN HFToken github_token GITHUB_TOKEN wandb_token hub_token model.token token_1 x-auth-token
--secret-key +wandb.api_key
""".split()

KEPT = """
max_tokens num_tokens tokens n_tokens_seen maxTokens pad_token eos_token pad_token_id token_dim token_embedding
tokenizer token_type special.pad_token bypass compass passes num_pass forward_pass n_auth author authors key key_size
num_keys num_key NUM_KEY key_dim query_key keys foreign_key FOREIGN_KEY PRIMARY_KEY sort_key rng_key keyboard monkey
KEY_SIZE secretary lr seed batch_size model name url sig signature
""".split()


@pytest.mark.parametrize("key", SECRET)
def test_secret_keys(key: str) -> None:
    assert is_secret(key)
    assert plain({"a": [{key: "S3CR3T", "lr": 1}]}) == {"a": [{key: HIDDEN, "lr": 1}]}


@pytest.mark.parametrize("key", KEPT)
def test_keys_that_only_look_secret(key: str) -> None:
    assert not is_secret(key)
    assert plain({key: 128}) == {key: 128}
    assert redact_argv([f"--{key}=128", f"--{key}", "128"]) == (f"--{key}=128", f"--{key}", "128")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["--secret-key=abc", "--lr", "1"], ["--secret-key=***", "--lr", "1"]),
        (["SECRET_KEY=abc", "x"], ["SECRET_KEY=***", "x"]),
        (["OPENAI_KEY=a=b"], ["OPENAI_KEY=***"]),
        (["--password", "-hunter2", "--lr"], ["--password", "***", "--lr"]),
        (["--password", "--hunter2", "x"], ["--password", "***", "x"]),
        (["--token", "--password", "abc", "x"], ["--token", "***", "***", "x"]),
        (["-token", "abc", "x"], ["-token", "***", "x"]),
        (["+wandb.api_key=abc", "~a"], ["+wandb.api_key=***", "~a"]),
        (["https://h/b?sig=abc&x=1"], ["https://h/b?sig=***&x=1"]),
        (["https://u:p@h/?password=abc&x=1"], ["https://***@h/?password=***&x=1"]),
        (["--url=s3://u:p@h/b"], ["--url=s3://***@h/b"]),
        (["-H", "Authorization: Bearer abc", "x"], ["-H", "Authorization: ***", "x"]),
        (["-H", "Authorization: Basic YWJj=="], ["-H", "Authorization: ***"]),
        (["Authorization:", "Bearer", "abc", "x"], ["Authorization:", "***", "***", "x"]),
        (["Bearer", "abc", "x"], ["Bearer", "***", "x"]),
        (["--header=Bearer abc"], ["--header=Bearer ***"]),
        (["--max-tokens", "5", "pass", "token"], ["--max-tokens", "5", "pass", "token"]),
        (["--config", "a.yaml", "--password"], ["--config", "a.yaml", "--password"]),
        ([], []),
    ],
)
def test_argv(given: list[str], kept: list[str]) -> None:
    assert list(redact_argv(given)) == kept
    assert plain({"args": given}) == {"args": kept}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("s3://user:pass@host/x", "s3://***@host/x"),
        ("s3://user:p@ss@host/x", "s3://***@host/x"),
        ("postgresql+psycopg2://u:p@h:5432/db", "postgresql+psycopg2://***@h:5432/db"),
        ("https://h/x?a=1&signature=abc#top", "https://h/x?a=1&signature=***"),
        ("https://h/x?key=abc&y=2", "https://h/x?key=***&y=2"),
        ("https://h/x?sv=1&sig=a%2Fb%3D&se=2", "https://h/x?sv=1&sig=***&se=2"),
        (
            "https://h/x?X-Amz-Algorithm=A&X-Amz-Credential=C/1&X-Amz-Signature=S&v=1",
            "https://h/x?X-Amz-Algorithm=***&X-Amz-Credential=***&X-Amz-Signature=***&v=1",
        ),
        ("https://h/x?AWSAccessKeyId=abc&Expires=1", "https://h/x?AWSAccessKeyId=***&Expires=1"),
        ("https://auth:8080/x and key: value", "https://auth:8080/x and key: value"),
        ("curl -H 'Authorization: Bearer abc' h", "curl -H 'Authorization: ***' h"),
        ("Bearer abc.def-g, x", "Bearer ***, x"),
        ("host=h password=ab'c,d user=u", "host=h password=*** user=u"),
        ("Server=h;Password=abc;User=u", "Server=h;Password=***;User=u"),
        ("Login(user='u', password='a b', lr=1)", "Login(user='u', password=***, lr=1)"),
        ("Login(auth=('u', 'p'), lr=1)", "Login(auth=***, lr=1)"),
        ("{'api_key': 'a\\'b', 'lr': 1}", "{'api_key': ***, 'lr': 1}"),
        ('{"url":"h?token=abc","secret":"x"}', '{"url":"h?token=***","secret":***}'),
        ("run --verbose --password -hunter2 --lr 1", "run --verbose --password *** --lr 1"),
        ("max_tokens=5, pad_token='<pad>', key_size: 3", "max_tokens=5, pad_token='<pad>', key_size: 3"),
        ("", ""),
    ],
)
def test_texts(text: str, kept: str) -> None:
    assert redact_text(text) == kept


PARTS = ["password", "=", ": ", "'", '"', "?", "&", "a", " ", "--token", "://", "@", "(", "]", "Bearer "]


@given(st.lists(st.sampled_from(PARTS)))
def test_what_follows_is_hidden_whatever_comes_before(parts: list[str]) -> None:
    found = redact_text("".join(parts) + " password=S3CR3T")
    assert "S3CR3T" not in found


LONG = ["a", "a.", "a=", "password=(", "password='", "a://", "--a ", "?a&", "' ", "bearer ", "A_", "aB", "-", " "]


@pytest.mark.parametrize("unit", LONG)
def test_long_texts_are_quick(unit: str) -> None:
    start = time.monotonic()
    plain(unit * 1_000_000)
    plain({unit * 10_000: 1})
    redact_argv([unit * 5_000])
    assert time.monotonic() - start < 5


def test_a_secret_that_is_cut_is_hidden() -> None:
    found = plain("x" * 9_990 + " s3://u:" + "p" * 100 + "@h/x")
    assert len(found) <= 10_000 and "pp" not in found


# --- values ---


@dataclass(slots=True)
class Slots:
    lr: float = 0.1
    password: str = "S3CR3T"
    inner: Any = None
    late: int = field(init=False)


@dataclass
class Open:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.99)


Pair = namedtuple("Pair", "user password")


class NoText:
    def __str__(self) -> str:
        raise ValueError("no text")

    __repr__ = __str__


class NoStr:
    def __str__(self) -> str:
        raise ValueError("no text")

    def __repr__(self) -> str:
        return "NoStr(password='S3CR3T')"


class Broken:
    size = 1

    def item(self) -> Any:
        raise RuntimeError("gone")

    def __str__(self) -> str:
        return "broken"


class Hostile:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class Lazy(Mapping[str, Any]):
    """A configuration one of whose entries cannot be read."""

    def __getitem__(self, key: str) -> Any:
        if key == "missing":
            raise LookupError(key)
        return 1

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "missing"])

    def __len__(self) -> int:
        return 2


VALUES = [
    (torch.tensor(3), 3),
    (torch.tensor([[0.5]], requires_grad=True), 0.5),
    (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
    (torch.tensor(float("nan")), "nan"),
    (torch.tensor([1, 2]), [1, 2]),
    (torch.tensor([]), []),
    (np.float32(0.5), 0.5),
    (np.array([[7]]), 7),
    (np.array([1.0, np.inf]), [1.0, "inf"]),
    (np.bool_(True), True),
    (np.str_("s3://u:p@h"), "s3://***@h"),
    (float("-inf"), "-inf"),
    (True, True),
    (None, None),
    (1j, "1j"),
    (10**20, 10**20),
    (Path("a/b"), "a/b"),
    (Slots(), {"lr": 0.1, "password": HIDDEN, "inner": None}),
    (Slots(inner=[Open()]), {"lr": 0.1, "password": HIDDEN, "inner": [{"lr": 0.1, "betas": [0.9, 0.99]}]}),
    (Pair("u", "S3CR3T"), {"user": "u", "password": HIDDEN}),
    (argparse.Namespace(lr=1, token="S3CR3T"), {"lr": 1, "token": HIDDEN}),
    (SimpleNamespace(lr=1, pwd="S3CR3T"), {"lr": 1, "pwd": HIDDEN}),
    (NoText(), "NoText"),
    (NoStr(), f"NoStr(password={HIDDEN})"),
    (Broken(), "broken"),
    (Lazy(), {"a": 1, "missing": "LookupError"}),
    ({NoText(): 1, "s3://u:p@h": 2, 3: 4}, {"NoText": 1, "s3://***@h": 2, "3": 4}),
    ({1, }, [1]),
]  # fmt: skip


@pytest.mark.parametrize(("value", "kept"), VALUES)
def test_values(value: Any, kept: Any) -> None:
    found = plain({"value": value})["value"]
    assert found == kept and type(found) is type(kept)
    json.dumps(found, allow_nan=False)


def _endless() -> Any:
    ring: list[Any] = [{"password": "S3CR3T"}]
    ring.extend([ring] * 20)
    return ring


def _object_array() -> Any:
    found = np.empty(1, object)
    found[0] = found
    return found


def _deep() -> Any:
    found: Any = {"password": "S3CR3T"}
    for _ in range(30):
        found = {"inner": found}
    return found


ODD = {
    "meta": lambda: torch.empty(2, device="meta"),
    "meta number": lambda: torch.empty((), device="meta"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "large": lambda: torch.zeros(2000),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1)]),
    "complex32": lambda: torch.zeros(1, dtype=torch.complex32),
    "module": lambda: torch.nn.Linear(1, 1),
    "class": lambda: torch.nn.Linear,
    "dtype": lambda: torch.float32,
    "large array": lambda: np.zeros(2000),
    "date": lambda: np.datetime64("2020"),
    "structure": lambda: np.zeros(1, "i4,f4"),
    "longdouble": lambda: np.longdouble(1),
    "long number": lambda: -(10**10_000),
    "surrogate": lambda: "\ud800",
    "bytes": lambda: b"\xff",
    "hostile": Hostile,
    "dataclass": lambda: Slots,
    "function": lambda: print,
    "endless": _endless,
    "array in itself": _object_array,
    "deep": _deep,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("odd", ODD)
def test_nothing_raises_and_all_is_json(odd: str) -> None:
    text = json.dumps(hyperparameters({"value": ODD[odd]()}), allow_nan=False)
    assert "S3CR3T" not in text and len(text) < 200_000


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
))  # fmt: skip
def test_any_data_is_json(value: Any) -> None:
    json.dumps(plain(value), allow_nan=False)


@pytest.mark.parametrize("given", [{"lr": 0.1}, Slots(), Open(), argparse.Namespace(lr=0.1), Pair(0.1, "S3CR3T")])
def test_hyperparameters_of_a_hook(tmp_path: Path, given: Any) -> None:
    smdbg.Hook(tmp_path / "run", hyperparameters=given).close()
    kept = smdbg.open_run(tmp_path / "run").hyperparameters
    assert kept.get("lr", kept.get("user")) == 0.1 and kept.get("password", HIDDEN) == HIDDEN


def test_a_tensor_and_odd_objects_as_hyperparameters_of_a_hook(tmp_path: Path) -> None:
    given = {"lr": torch.tensor(0.5), "weights": torch.ones(2), "odd": NoText(), "config": Slots()}
    smdbg.Hook(tmp_path / "run", hyperparameters=given).close()
    kept = smdbg.open_run(tmp_path / "run").hyperparameters
    assert kept["lr"] == 0.5 and kept["weights"] == [1, 1] and kept["odd"] == "NoText" and kept["config"]["lr"] == 0.1


@pytest.mark.parametrize("given", [3, "text", [1], object()])
def test_what_has_no_names_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="must be a mapping or have attributes"):
        hyperparameters(given)


@pytest.mark.parametrize(
    ("given", "found"), [({"seed": 3}, 3), (Slots(), None), ({"seed": True}, None), (None, None)]
)
def test_seed(given: Any, found: int | None) -> None:
    assert seed(given) == found


def test_seed_of_an_object_that_raises() -> None:
    assert seed(Hostile()) is None


# --- tensors ---

DENSE = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0] * 4, [0.0, -3.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0]])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc, torch.Tensor.to_mkldnn,
        lambda t: t.to_sparse_bsr((2, 2)), lambda t: t.to_sparse_bsc((2, 2)),
        lambda t: torch.sparse_coo_tensor([[0, 0, 0, 2, 3], [0, 0, 3, 1, 0]], [0.5, 0.5, 2, -3, 0.5], (4, 4)),
        lambda t: torch.quantize_per_tensor(t, 0.5, 0, torch.qint8),
        lambda t: torch.quantize_per_channel(t, torch.full((4,), 0.5), torch.full((4,), 10), 0, torch.quint8),
    ],
    ids="coo csr csc mkldnn bsr bsc repeated quantized quantized_by_channel".split(),
)  # fmt: skip
def test_other_layouts_become_dense(make: Any) -> None:
    elements, dtype, shape, _ = to_elements(make(DENSE))
    assert dtype == "float32" and shape == (4, 4)
    assert elements.tolist() == DENSE.reshape(-1).tolist()


def test_sparse_bfloat16_becomes_dense() -> None:
    elements, dtype, shape, _ = to_elements(DENSE.bfloat16().to_sparse())
    assert dtype == "bfloat16" and shape == (4, 4)
    assert elements.tolist() == DENSE.bfloat16().view(torch.uint16).reshape(-1).tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda: torch.nested.nested_tensor([DENSE, DENSE[:2]]), "nested tensor cannot be kept"),
        (lambda: torch.nested.nested_tensor([DENSE, DENSE[:2]], layout=torch.jagged), "nested tensor cannot be kept"),
        (lambda: torch.zeros(2, dtype=torch.complex32), "complex32 cannot be kept.*complex64"),
        (lambda: np.longdouble(1), "cannot be kept bit for bit.*float64"),
        (lambda: np.zeros(2, np.clongdouble), "cannot be kept bit for bit.*complex128"),
    ],
    ids=["nested", "jagged", "complex32", "longdouble", "clongdouble"],
)
def test_what_cannot_be_kept_says_so(value: Any, text: str) -> None:
    found = value()
    if isinstance(found, np.ndarray | np.generic) and found.dtype in (np.dtype("f8"), np.dtype("c16")):
        pytest.skip("on this machine it is a double")
    with pytest.raises(TypeError, match=text):
        to_elements(found)
