"""The peer LitServe in the benchmark ``serving``, which sends a class to its processes."""

from litserve import LitAPI, LitServer

from .sleeping import BATCH, PATH, PROCESSES, answer, row_of, sleeping


class Api(LitAPI):  # type: ignore[misc]
    """The model of the benchmark."""

    def setup(self, device: str) -> None:
        self.predict = sleeping()
        self.decode_request, self.encode_response = row_of, answer


def run(port: int) -> None:
    api = Api(max_batch_size=BATCH, api_path=PATH)
    server = LitServer(api, accelerator="cpu", workers_per_device=PROCESSES)
    server.run(port=port, host="127.0.0.1", generate_client_file=False, log_level="critical")
