"""Settings of the caller that would round fp32 products: they do not reach the results, and they are put back."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from test_layer import CSA, make_cache, random_weights, tiny_config

from lightning_indexer import Compressor, sparse_attention
from lightning_indexer.nn.linear import strip
from lightning_indexer.precision import full_float32

MKLDNN, CUDA = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul


def state() -> tuple[str, ...]:
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # older and newer settings disagree
        older = "mixed"
    autocast = (str(torch.is_autocast_enabled(device)) for device in ("cpu", "cuda"))
    return (MKLDNN.fp32_precision, CUDA.fp32_precision, older, *autocast)


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = MKLDNN.fp32_precision = CUDA.fp32_precision = "none"
    for device in ("cpu", "cuda"):
        torch.set_autocast_enabled(device, False)


SETTINGS = {
    "nothing": lambda: None,
    "older-high": lambda: torch.set_float32_matmul_precision("high"),
    "older-medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older-tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "newer-for-all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "newer-for-cuda": lambda: setattr(CUDA, "fp32_precision", "tf32"),
    "newer-for-the-cpu": lambda: setattr(MKLDNN, "fp32_precision", "bf16"),
    "older-and-newer": lambda: (
        torch.set_float32_matmul_precision("high"),
        setattr(MKLDNN, "fp32_precision", "bf16"),
    ),
    "autocast-cuda": lambda: torch.set_autocast_enabled("cuda", True),
    "autocast-cpu": lambda: torch.set_autocast_enabled("cpu", True),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_off_inside_and_put_back(setting: str) -> None:
    SETTINGS[setting]()
    before = state()
    with pytest.raises(KeyError), full_float32():
        inside = state()
        assert not CUDA.allow_tf32, "torch reads both settings here, and raises where they disagree"
        with full_float32():
            assert state() == inside
        assert state() == inside
        raise KeyError
    assert set(inside[:2]) <= {"none", "ieee"} and inside[2:] == ("highest", "False", "False"), inside
    assert state() == before


def test_a_setting_for_all_of_torch_still_reaches_the_backends_afterwards() -> None:
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        pass
    torch.backends.fp32_precision = "ieee"
    assert (MKLDNN.fp32_precision, CUDA.fp32_precision) == ("ieee", "ieee")


def test_threads_that_overlap_leave_the_setting_as_it_was() -> None:
    CUDA.fp32_precision = "tf32"
    inside, leave = threading.Event(), threading.Event()

    @full_float32()
    def stay() -> None:
        inside.set()
        assert leave.wait(30)

    other = threading.Thread(target=stay)
    other.start()
    assert inside.wait(30)
    torch.set_autocast_enabled("cpu", True)
    with full_float32():
        assert CUDA.fp32_precision == "ieee" and not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_enabled("cpu"), "autocast is this thread's own"
    assert CUDA.fp32_precision == "ieee", "the other thread is still inside"
    leave.set()
    other.join()
    assert CUDA.fp32_precision == "tf32"


def test_a_decorated_function_keeps_its_name_and_result() -> None:
    @full_float32()
    def twice(x: int) -> int:
        """Doc."""
        return 2 * x

    assert (twice(3), twice.__name__, twice.__doc__) == (6, "twice", "Doc.")


def attend() -> torch.Tensor:
    q, kv = torch.randn(2, 8, 64), torch.randn(2, 50, 64)
    valid = torch.ones(2, 50, dtype=torch.bool)
    return torch.cat(
        [t.flatten() for t in sparse_attention(q, kv, kv[:, :0], valid=valid, sink=None, softmax_scale=1.0)]
    )


def compress() -> torch.Tensor:
    config = tiny_config()
    compressor, cache = Compressor(config, CSA, dim=128), make_cache(config, CSA, index_format="fp32")
    weights = random_weights(config, CSA)
    compressor.load_weights(strip(strip(weights, "indexer."), "compressor."))
    step = cache.begin_step([0], [40])
    return compressor(torch.randn(40, config.hidden_size), step, cache.indexer_state)


@pytest.mark.parametrize("run", [attend, compress])
@pytest.mark.parametrize("setting", ["older-medium", "newer-for-the-cpu", "autocast-cpu"])
def test_results_are_the_same_bits(setting: str, run: Callable[[], torch.Tensor]) -> None:
    torch.manual_seed(0)
    expected = run()
    SETTINGS[setting]()
    torch.manual_seed(0)
    assert torch.equal(run(), expected)
