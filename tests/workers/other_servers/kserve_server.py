"""KServe's server of a model, at the port that is the only argument."""

import sys

from behaviour import doubled
from kserve import InferOutput, InferResponse, Model, ModelServer

SPEC = {"datatype": "FP32", "shape": [-1, 3]}


class Double(Model):
    def __init__(self):
        super().__init__("double")
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        rows = await doubled(payload.inputs[0].as_numpy())
        output = InferOutput("output", list(rows.shape), "FP32")
        output.set_data_from_numpy(rows, binary_data=False)
        return InferResponse(payload.id, self.name, [output])

    async def get_input_types(self):
        return [{"name": "input", **SPEC}]

    async def get_output_types(self):
        return [{"name": "output", **SPEC}]


if __name__ == "__main__":
    server = ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1)
    server.start([Double()])
