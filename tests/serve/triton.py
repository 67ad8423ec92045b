"""What Triton's client sends and must get, from an application wherever it runs."""

import itertools

import numpy as np
import pytest
import torch
import tritonclient.http as triton

from coded_torch.demo.lenet5 import lenet5_and_digits
from coded_torch.serve import specs

from .servers import built

CASES = list(
    itertools.product((1, 7, 64), ("FP32", "FP16"), (True, False), (None, "gzip", "deflate"))
)
_TYPES = {"FP32": np.float32, "FP16": np.float16}
#: What is wrong with a request: the input's name, datatype and shape, and the output's name.
WRONG = {
    "input name": ("pixels", "FP32", (1, 1, 28, 28), "output"),
    "output name": ("input", "FP32", (1, 1, 28, 28), "logits"),
    "datatype": ("input", "FP64", (1, 1, 28, 28), "output"),
    "shape": ("input", "FP32", (1, 28, 28), "output"),
    "no rows": ("input", "FP32", (0, 1, 28, 28), "output"),
    "too many rows": ("input", "FP32", (65, 1, 28, 28), "output"),
    "not finite": ("input", "FP32", (1, 1, 28, 28), "output"),
}


def triton_application(**options):
    module, examples = lenet5_and_digits()
    inputs, outputs = specs(module, examples)
    return built(module, inputs=inputs, outputs=outputs, **options)


def check_metadata(port):
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        for version in ("", "1"):
            assert client.is_model_ready("m", version)
            metadata = client.get_model_metadata("m", version)
            assert metadata["inputs"][0]["shape"] == [-1, 1, 28, 28]
        assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
        assert not client.is_model_ready("other")


def check_case(port, rows, datatype, binary, packed):
    module, (examples,) = lenet5_and_digits()
    images = examples.repeat(7, 1, 1, 1)[:rows].numpy().astype(_TYPES[datatype])
    asked = triton.InferInput("input", list(images.shape), datatype)
    asked.set_data_from_numpy(images, binary_data=binary)
    wanted = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("output", "predicted", "expected_error")
    ]
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        answer = client.infer(
            "m",
            [asked],
            outputs=wanted,
            request_id="7",
            timeout=4_000_000,
            request_compression_algorithm=packed,
            response_compression_algorithm=packed,
        )
    with torch.no_grad():
        exact = module(torch.from_numpy(images).float()).numpy()
    # The answers of a batch of another size differ in their last bits.
    np.testing.assert_allclose(answer.as_numpy("output"), exact, rtol=1e-4, atol=1e-4)
    assert answer.as_numpy("predicted").tolist() == [False] * rows
    assert answer.as_numpy("expected_error").tolist() == [0.0] * rows
    assert answer.get_response()["id"] == "7"


def check_wrong(port, name):
    input_name, datatype, shape, output_name = WRONG[name]
    value = np.nan if name == "not finite" else 0
    images = np.full(shape, value, {"FP64": np.float64}.get(datatype, np.float32))
    asked = triton.InferInput(input_name, list(shape), datatype)
    asked.set_data_from_numpy(images)
    with (
        triton.InferenceServerClient(f"127.0.0.1:{port}") as client,
        pytest.raises(triton.InferenceServerException) as caught,
    ):
        client.infer("m", [asked], outputs=[triton.InferRequestedOutput(output_name)])
    assert caught.value.status() == "400"
