"""A real GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.component("gpu")


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device here")
    return torch.device("cuda")


def test_bf16_convolution_agrees_with_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, 3, 32, 32, generator=generator)
    weight = torch.randn(8, 3, 3, 3, generator=generator) / 5
    expected = torch.nn.functional.conv2d(images, weight, padding=1)
    got = torch.nn.functional.conv2d(images.to(device, torch.bfloat16), weight.to(device, torch.bfloat16), padding=1)
    torch.testing.assert_close(got.float().cpu(), expected, rtol=0.05, atol=0.05)
