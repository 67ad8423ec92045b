"""A model for MLServer."""

from behaviour import doubled
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse


class Double(MLModel):
    async def predict(self, payload):
        rows = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("output", await doubled(rows))
        return InferenceResponse(model_name=self.name, id=payload.id, outputs=[output])
