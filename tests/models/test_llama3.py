import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline import Batch
from sightline.models import Llama3, Llama3Config, Llama3RopeScaling, build_model, decoder

CONFIG = Llama3Config(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    rope_theta=100.0,
    rope_scaling=Llama3RopeScaling(original_context=16),
)
DOCUMENTS = [list(range(1, 12)), [20], list(range(21, 30)), list(range(30, 45)), [50, 51, 52]]
BACKENDS = ["sdpa", "reference"]


def make_model(config: Llama3Config = CONFIG, backend: str = "auto") -> Llama3:
    torch.manual_seed(0)
    model = build_model(config, attention_backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():  # norm weights of 1 would hide a norm in the wrong place
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def make_batch() -> Batch:
    """Two rows: [11, 1, 9, 3 of 15], and [12 more of 15, 3, padding]."""
    batch = Batch.from_documents(DOCUMENTS, length=24)
    assert batch.shape == (2, 24) and (batch.document_ids == -1).sum() == 9
    return batch


def run(model: Llama3, batch: Batch, *, labels: bool = False) -> Tensor:
    return model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels if labels else None,
    )


def naive(state: dict[str, Tensor], tokens: Tensor, positions: Tensor) -> Tensor:
    """Return the logits [n, V] of Llama 3.1 for one document, in float64: a reference written from the paper."""
    config, size = CONFIG, CONFIG.hidden_size // CONFIG.num_heads
    state = {name: weight.double() for name, weight in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * state[name]

    frequencies = []
    for pair in range(size // 2):
        frequency = config.rope_theta ** (-2 * pair / size)
        turns = 16 * frequency / (2 * math.pi)  # over the original context
        unscaled = min(1.0, max(0.0, (turns - 1.0) / (4.0 - 1.0)))
        frequencies.append(unscaled * frequency + (1 - unscaled) * frequency / 8.0)
    rotation = torch.exp(1j * positions.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64))

    def rope(x: Tensor) -> Tensor:
        z = torch.complex(x[:, : size // 2], x[:, size // 2 :]) * rotation
        return torch.cat([z.real, z.imag], dim=1)

    h = state["embedding.weight"][tokens]
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    for i in range(config.num_layers):
        p = f"layers.{i}."
        x = norm(h, p + "attention_norm.weight")
        q, k, v = ((x @ state[f"{p}attention.{name}.weight"].t()).split(size, 1) for name in ("query", "key", "value"))
        outs = []
        for head in range(config.num_heads):
            kv_head = head // (config.num_heads // config.num_kv_heads)
            scores = rope(q[head]) @ rope(k[kv_head]).t() / size**0.5
            outs.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v[kv_head])
        h = h + torch.cat(outs, 1) @ state[p + "attention.output.weight"].t()
        x = norm(h, p + "mlp_norm.weight")
        gate, up = (x @ state[f"{p}mlp.{name}.weight"].t() for name in ("gate", "up"))
        h = h + (gate * gate.sigmoid() * up) @ state[p + "mlp.down.weight"].t()
    return norm(h, "norm.weight") @ state["output.weight"].t()


def pieces(batch: Batch) -> list[tuple[int, Tensor]]:
    """Return (row, token indices) of every document of the batch, by its document ids."""
    return [
        (row, (batch.document_ids[row] == number).nonzero()[:, 0])
        for row in range(batch.shape[0])
        for number in range(int(batch.document_ids[row].max()) + 1)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_naive_model_on_each_document(backend: str) -> None:
    model, batch = make_model(backend=backend), make_batch()
    logits = run(model, batch)
    assert logits.shape == (2, 24, 61) and len(pieces(batch)) == 6
    for row, index in pieces(batch):
        expected = naive(model.state_dict(), batch.tokens[row, index], batch.positions[row, index])
        torch.testing.assert_close(logits[row, index].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_separate(backend: str) -> None:
    model, batch = make_model(backend=backend), make_batch()
    logits, loss = run(model, batch), run(model, batch, labels=True)
    grads = torch.autograd.grad(loss, list(model.parameters()))

    single_loss = torch.zeros(())
    for row, index in pieces(batch):
        single = Batch(
            tokens=batch.tokens[row, index][None],
            labels=batch.labels[row, index][None],
            document_ids=torch.zeros(1, len(index), dtype=torch.int32),
            positions=batch.positions[row, index][None],
        )
        torch.testing.assert_close(run(model, single)[0], logits[row, index], atol=1e-5, rtol=1e-5)
        single_loss = single_loss + run(model, single, labels=True)
    torch.testing.assert_close(single_loss, loss)
    for grad, expected in zip(grads, torch.autograd.grad(single_loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", [0, 5, 11, 15, 20])  # row 0: first, middle, one-token, later, split document
def test_no_leakage_between_documents(backend: str, changed: int) -> None:
    model, batch = make_model(backend=backend), make_batch()
    tokens = batch.tokens.clone()
    tokens[0, changed] = 60  # in no document
    perturbed = replace(batch, tokens=tokens)
    same_document = batch.document_ids == batch.document_ids[0, changed]
    same_document[1] = False

    def logits_and_embedding_grad(batch: Batch) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        run(model, batch, labels=True).backward()
        return run(model, batch), model.embedding.weight.grad

    (before, grad_before), (after, grad_after) = logits_and_embedding_grad(batch), logits_and_embedding_grad(perturbed)
    others = batch.tokens[~same_document & (batch.document_ids >= 0)].unique()
    assert torch.equal(before[~same_document], after[~same_document])
    assert torch.equal(grad_before[others], grad_after[others]) and grad_before[others].abs().sum() > 0
    later = same_document.clone()
    later[:, :changed] = False
    assert (before[later] != after[later]).any(dim=-1).all(), "later tokens of the same document must change"
    earlier = same_document & ~later
    assert torch.equal(before[earlier], after[earlier]), "earlier tokens must not change"


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_are_finite_and_have_no_gradient(backend: str) -> None:
    model, batch = make_model(backend=backend), make_batch()
    empty = Batch(
        tokens=torch.zeros_like(batch.tokens),
        labels=torch.full_like(batch.labels, -100),
        document_ids=torch.full_like(batch.document_ids, -1),
        positions=torch.zeros_like(batch.positions),
    )
    assert run(model, empty).isfinite().all()
    loss = run(model, empty, labels=True)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())

    # Token 0 occurs only as padding: no gradient reaches its embedding.
    model.zero_grad()
    run(model, batch, labels=True).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.embedding.weight.grad[0], torch.zeros(32)) and run(model, batch).isfinite().all()


def test_loss_is_the_sum_of_token_losses() -> None:
    model, batch = make_model(), make_batch()
    expected = F.cross_entropy(run(model, batch).flatten(0, 1), batch.labels.flatten(), reduction="sum")
    loss = run(model, batch, labels=True)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected)


def test_loss_under_bfloat16_autocast_is_close() -> None:
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(model, batch, labels=True)
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(loss, run(model, batch, labels=True), atol=0, rtol=2e-2)


def test_mask_is_lowered_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(*args, **kwargs):
        calls.append({name: kwargs[name] for name in expected})
        return lower(*args, **kwargs)

    lower = decoder.lower_queries
    monkeypatch.setattr(decoder, "lower_queries", spy)
    model, batch = make_model(backend="sdpa"), make_batch()
    expected = {"backend": "sdpa", "device": torch.device("cpu"), "dtype": torch.float32, "training": True}
    run(model, batch)
    assert calls == [expected]
    with torch.no_grad():
        run(model, batch)
    model.requires_grad_(False)
    run(model, batch)
    assert calls[1:] == [{**expected, "training": False}] * 2


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'magic'.*reference"):
        run(make_model(backend="magic"), make_batch())


def test_pipeline_stage_is_the_model_with_modules_removed() -> None:
    model, first, last = make_model(), make_model(), make_model()
    del first.layers["1"]
    first.norm = first.output = None
    del last.layers["0"]
    last.embedding = None
    batch = make_batch()
    inputs = {"attention_masks": model.get_attention_masks(batch), "positions": batch.positions}
    h = first(batch.tokens, **inputs)
    assert h.shape == (2, 24, 32)
    assert torch.equal(last(h, **inputs), run(model, batch))
    assert torch.equal(last(h, **inputs, labels=batch.labels), run(model, batch, labels=True))


def test_tied_embeddings_are_one_parameter_with_both_gradients() -> None:
    tied = make_model(replace(CONFIG, tied_embeddings=True))
    assert tied.output is None and "output.weight" not in tied.state_dict()
    untied, batch = make_model(), make_batch()
    untied.load_state_dict({**tied.state_dict(), "output.weight": tied.embedding.weight})
    assert torch.equal(run(tied, batch), run(untied, batch))
    run(tied, batch, labels=True).backward()
    run(untied, batch, labels=True).backward()
    both = untied.embedding.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both)


def test_initial_weights_have_the_documented_std() -> None:
    torch.manual_seed(0)
    tiny = Llama3Config(hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=512)
    state = build_model(tiny).state_dict()
    inner, residual = 1 / 16, 1 / 16 / 2  # hidden_size^-0.5, and that / sqrt(2 * num_layers)
    expected = {
        "embedding": 1.0,
        "output": inner,
        **{f"layers.1.attention.{name}": inner for name in ("query", "key", "value")},
        **{f"layers.1.mlp.{name}": inner for name in ("gate", "up")},
        "layers.0.attention.output": residual,
        "layers.0.mlp.down": residual,
    }
    assert {n: state[n + ".weight"].std().item() for n in expected} == pytest.approx(expected, rel=0.02)
    assert all(torch.equal(w, torch.ones(256)) for name, w in state.items() if "norm" in name)
    tied = build_model(replace(tiny, tied_embeddings=True))
    assert tied.embedding.weight.std().item() == pytest.approx(inner, rel=0.02)


def test_parameter_names() -> None:
    """Checkpoints use these names: a change here makes them unreadable."""
    layer = [
        "attention_norm.weight",
        "attention.query.weight",
        "attention.key.weight",
        "attention.value.weight",
        "attention.output.weight",
        "mlp_norm.weight",
        "mlp.gate.weight",
        "mlp.up.weight",
        "mlp.down.weight",
    ]
    expected = ["embedding.weight", *(f"layers.{i}.{n}" for i in range(2) for n in layer), "norm.weight"]
    assert list(build_model("llama3-debug").state_dict()) == [*expected, "output.weight"]


def test_flops_count_all_linear_layers() -> None:
    """Per token and parameter of a linear layer: 2 FLOPs forward, 4 backward."""
    from_linears = 0
    model = make_model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            from_linears += module.weight.numel()
    assert model.flops_per_token() == 6 * from_linears
    assert make_model(replace(CONFIG, tied_embeddings=True)).flops_per_token() == 6 * from_linears
    wide_heads = make_model(replace(CONFIG, head_dim=20))
    assert wide_heads.flops_per_token() == 6 * (from_linears + 2 * 32 * (2 * 4 + 2 * 2) * (20 - 8))
    # llama3-tiny by hand: 6 layers of 256 x (256 + 128 + 128 + 256 + 3 x 688), and the head of 256 x 8192
    assert build_model("llama3-tiny").flops_per_token() == 6 * (6 * 256 * (768 + 2064) + 256 * 8192)
    assert build_model("llama3-tiny").flops_per_pair("attention") == 12 * 256 * 6


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"num_heads": 6, "num_kv_heads": 4, "hidden_size": 96},
            r"heads 6 is not divisible by model.num-kv-heads 4; .*\[1, 2, 3, 6\]",
        ),
        ({"hidden_size": 250}, "hidden-size 250 is not divisible by model.num-heads 8; .*head-dim"),
        ({"hidden_size": 24}, "must be even.*got 3"),
        ({"head_dim": 0}, "must be even.*got 0"),
        ({"num_layers": 0}, "model.num-layers must be greater than 0, got 0"),
        ({"vocab_size": -5}, "model.vocab-size must be greater than 0, got -5"),
        ({"rope_theta": 0.0}, "model.rope-theta must be greater than 0, got 0.0"),
    ],
)
def test_invalid_config_raises(fields: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Llama3Config(**fields)
