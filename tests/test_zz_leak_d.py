import pytest
import torch
from test_long_run import *
from test_long_run import Readings

LEAK = []


@pytest.fixture(params=["tensors", "file"])
def leak(request, monkeypatch):
    end = Readings.on_step_end

    def on_step_end(self, *a, **k):
        end(self, *a, **k)
        LEAK.append(torch.ones(60_000) if request.param == "tensors" else open("/dev/null"))

    monkeypatch.setattr(Readings, "on_step_end", on_step_end)


def test_leak(leak, tokenizer, quick, tmp_path):
    test_a_long_run_holds_no_more_at_its_end_and_is_no_slower("LoRA, a stream", tokenizer, quick, tmp_path)
