"""Triton's own client, unmodified, gets right answers from an application, wherever it runs."""

import functools
import itertools
import time

import numpy as np
import pytest
import torch
import tritonclient.http as triton

from coded_torch.demo import lenet5_and_digits
from coded_torch.serve import specs
from coded_torch.workers import EndpointWorkers, RemoteModule

from .servers import built, serving

ROWS, PACKINGS = (1, 7, 64), (None, "gzip", "deflate")
# 108 cases: the encodings and the compressions of the request and of the answer.
CASES = list(itertools.product(ROWS, *[(True, False)] * 2, *[PACKINGS] * 2))
ALIKE = [case for case in CASES if case[1] == case[2] and case[3] == case[4]]
shipped = functools.cache(lenet5_and_digits)


class TritonTests:
    """The tests of a server of LeNet-5, named m, at the fixture ``address``."""

    def test_metadata(self, address):
        with triton.InferenceServerClient(address) as client:
            assert client.is_server_live()
            assert client.is_server_ready()
            for version in ("", "1"):
                assert client.is_model_ready("m", version)
                metadata = client.get_model_metadata("m", version)
                assert metadata["inputs"][0]["shape"] == [-1, 1, 28, 28]
            assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
            assert not client.is_model_ready("other")
            with pytest.raises(triton.InferenceServerException, match="/v2/models/other'; the mod"):
                client.get_model_metadata("other")

    def test_repository_configuration_and_statistics(self, address):
        self.check(address, 7, True, True, None, None)
        with triton.InferenceServerClient(address) as client:
            (model,) = client.get_model_repository_index()
            assert model == {"name": "m", "version": "1", "state": "READY", "reason": ""}
            for version in ("", "1"):
                config = client.get_model_config("m", version)
                assert (config["name"], config["max_batch_size"]) == ("m", 64)
                image = {"name": "input", "data_type": "TYPE_FP32", "dims": [1, 28, 28]}
                assert config["input"] == [image]
                (of_model,) = client.get_inference_statistics("m", version)["model_stats"]
                assert (of_model["name"], of_model["version"]) == ("m", "1")
            (found,) = client.get_inference_statistics()["model_stats"]
        assert found["inference_count"] >= 7
        assert found["execution_count"] >= 1
        assert abs(found["last_inference"] / 1000 - time.time()) < 300
        times = found["inference_stats"]
        names = {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output"}
        assert set(times) == names
        assert times["success"]["count"] >= 1
        assert all(times[name]["ns"] > 0 for name in names - {"fail"})
        assert times["success"]["ns"] >= times["compute_infer"]["ns"]

    @pytest.mark.parametrize("case", ALIKE)
    def test_answers(self, address, case):
        self.check(address, *case)

    def check(self, address, rows, sent, got, packed, unpacked):
        """Check the answer to one request."""
        module, (examples,) = shipped()
        images = examples.repeat(7, 1, 1, 1)[:rows].numpy()
        asked = triton.InferInput("input", list(images.shape), "FP32")
        asked.set_data_from_numpy(images, binary_data=sent)
        names = ("output", "estimated", "error_bound")
        options = {
            "outputs": [triton.InferRequestedOutput(name, binary_data=got) for name in names],
            "request_id": "7",
            "timeout": 4_000_000,
            "request_compression_algorithm": packed,
            "response_compression_algorithm": unpacked,
        }
        with triton.InferenceServerClient(address) as client:
            answer = client.infer("m", [asked], **options)
        with torch.no_grad():
            exact = module(torch.from_numpy(images)).numpy()
        # The answers of a batch of another size differ in their last bits.
        np.testing.assert_allclose(answer.as_numpy("output"), exact, rtol=1e-4, atol=1e-4)
        assert answer.as_numpy("estimated").tolist() == [False] * rows
        assert answer.as_numpy("error_bound").tolist() == [0.0] * rows
        assert answer.get_response()["id"] == "7"

    def test_a_wrong_request_is_400(self, address):
        asked = triton.InferInput("input", [1, 1, 28, 28], "FP64")
        asked.set_data_from_numpy(np.zeros((1, 1, 28, 28)))
        refused = pytest.raises(triton.InferenceServerException, match="must be FP32, got 'FP64'")
        with triton.InferenceServerClient(address) as client, refused as caught:
            client.infer("m", [asked])
        assert caught.value.status() == "400"


@pytest.fixture(scope="module")
def port():
    module, examples = shipped()
    inputs, outputs = specs(module, examples)
    with serving(built(module, inputs=inputs, outputs=outputs)) as port:
        yield port


class TestUvicorn(TritonTests):
    @pytest.fixture
    def address(self, port):
        return f"127.0.0.1:{port}"


@pytest.fixture(scope="module")
def proxy(port):
    module, examples = shipped()
    inputs, outputs = specs(module, examples)
    with serving(built(module, inputs=inputs, outputs=outputs)) as second:
        urls = [f"http://127.0.0.1:{each}" for each in (port, second)]
        found = RemoteModule(urls[0], "m")
        pool = EndpointWorkers(urls, model="m")
        with serving(built(found, workers=pool, inputs=inputs, outputs=outputs)) as front:
            yield front


class TestProxy(TritonTests):
    """A server in front of two servers."""

    @pytest.fixture
    def address(self, proxy):
        return f"127.0.0.1:{proxy}"

    @pytest.mark.parametrize("case", CASES)
    def test_answers(self, address, case):
        self.check(address, *case)
