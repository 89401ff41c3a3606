"""transformers' DeepSeek-V4 on a GPU with this library's index cache and selection.

Two comparisons with the model alone. Whole generations in fp32, where the reference selects on the GPU ("fp32" keys
have no kernel). And the kernels' choices, indexer by indexer on the inputs that the model alone gave it, against its
own scores: keys of a bf16 model are stored in bf16 without loss, so a choice may differ only where scores are closer
than both may be off.
"""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23", reason="needs the extra transformers")
# E402 below: without transformers these imports fail, so they follow the skip
from test_transformers_integration import (  # noqa: E402
    CASES,
    CSA_LAYERS,
    NEAR_TIE,
    TOP_K,
    generate,
    indexer_of,
    make_model,
    smallest_gap,
    tokens,
)
from transformers import DeepseekV4ForCausalLM  # noqa: E402

from lightning_indexer.integrations.transformers import accelerate, agreement  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE = "cuda"
SCORE_ERROR = 1e-4  # of a row's norm: what bf16 keys and queries are promised
LOGIT_ERROR = 1e-5  # of the largest logit; one wrong entry of one query was worth 9e-2


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


def model_on_device(dtype: torch.dtype) -> DeepseekV4ForCausalLM:
    model = make_model(dtype).to(DEVICE)
    model.set_experts_implementation("eager")  # the same sums on every run
    return model


@pytest.mark.parametrize("name", ["one-prompt", "batch", "chunked-prefill", "beams"])
def test_generates_what_the_model_alone_generates(name: str) -> None:
    model, case = model_on_device(torch.float32), next(case for case in CASES if case.name == name)
    prompts = tokens(case.batch, case.length).to(DEVICE)
    want = generate(model, prompts, **case.options)
    assert smallest_gap(model, want.sequences) > NEAR_TIE, "choose another seed"
    with accelerate(model, index_format="fp32", entries_per_block=16, impl="reference"):
        got = generate(model, prompts, **case.options)
    assert got.sequences.tolist() == want.sequences.tolist()
    ours, theirs = torch.stack(got.logits), torch.stack(want.logits)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= LOGIT_ERROR, f"logits differ by {error:.1e} of the largest"


Call = tuple[tuple[Any, ...], torch.Tensor]


def calls_of_the_model_alone(model: DeepseekV4ForCausalLM, input_ids: torch.Tensor) -> dict[int, Call]:
    """By CSA layer, what its indexer was called with and the scores [B, S, T] that it made."""
    arguments: dict[int, Any] = {}
    scores: dict[int, torch.Tensor] = {}
    handles = []
    for layer in CSA_LAYERS:
        indexer = indexer_of(model, layer)
        handles += [
            indexer.register_forward_pre_hook(lambda _m, args, layer=layer: arguments.update({layer: args})),
            indexer.scorer.register_forward_hook(lambda _m, _a, out, layer=layer: scores.update({layer: out.cpu()})),
        ]
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: (arguments[layer], scores[layer]) for layer in CSA_LAYERS}


@pytest.mark.parametrize("length", [203, 1024])
def test_every_choice_is_that_of_the_model_alone_or_a_near_tie(length: int) -> None:
    model = model_on_device(torch.bfloat16)
    calls = calls_of_the_model_alone(model, tokens(3, length).to(DEVICE))
    accelerate(model, index_format="bf16")
    choosing = 0
    for layer, (arguments, scores) in calls.items():
        with torch.no_grad():
            chosen = indexer_of(model, layer)(*arguments).cpu()
        for sequence in range(len(scores)):
            for t in range(length):
                visible = (t + 1) // 4
                row, got = scores[sequence, t, :visible], chosen[sequence, t]
                got = got[got >= 0]
                assert len(got.unique()) == len(got) == min(visible, TOP_K), (layer, sequence, t)
                if visible <= TOP_K:
                    continue
                choosing += 1
                best = row.topk(TOP_K + 1).values
                band = 2 * SCORE_ERROR * row.norm()
                left_out = row.clone()
                left_out[got] = -torch.inf
                where = f"layer {layer}, sequence {sequence}, query {t}"
                assert row[got].min() >= best[-2] - band, f"{where} took an entry that is not among the best"
                assert left_out.max() <= best[-2] + band, f"{where} left out one of the best"
    assert choosing == len(CSA_LAYERS) * 3 * (length - 4 * (TOP_K + 1) + 1)


@pytest.mark.parametrize("index_format", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_quantised_keys_agree_as_on_the_cpu(index_format: str) -> None:
    """The first CSA layer's input is the same, later ones differ with every near tie: one choice in 250 may too."""
    ids, model = tokens(2, 203), model_on_device(torch.float32)
    got = agreement(model, ids.to(DEVICE), index_format=index_format)
    want = agreement(model.cpu(), ids, index_format=index_format)
    assert got.entries[1] == pytest.approx(want.entries[1], abs=4e-3)
    assert got.tokens > 0.85


@pytest.mark.parametrize("index_format", ["mxfp4", "nvfp4", "fp8", "bf16"])
def test_kernels_serve_generation_with_beams(index_format: str) -> None:
    model = model_on_device(torch.bfloat16)
    with accelerate(model, index_format=index_format, entries_per_block=16):
        first, again = (generate(model, tokens(2, 203).to(DEVICE), num_beams=3) for _ in range(2))
    assert first.sequences.shape == (2, 215) and first.sequences.tolist() == again.sequences.tolist()
    assert first.past_key_values.layers[1].pool.storage.is_cuda


def test_fp32_keys_need_the_reference() -> None:
    model = model_on_device(torch.float32)
    with accelerate(model, index_format="fp32"), pytest.raises(NotImplementedError, match="'reference' serves it"):
        generate(model, tokens(1, 40).to(DEVICE))
