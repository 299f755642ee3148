"""The smallest model server: FastAPI and uvicorn in one process. It takes 16 numbers and returns a probability.

python serve_fastapi.py PORT MODEL_FOLDER
"""

from __future__ import annotations

import sys

import lightgbm as lgb
import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse


def application(file: str) -> FastAPI:
    """Return the service."""
    app, booster = FastAPI(), lgb.Booster(model_file=file)

    @app.post("/predict")
    async def predict(request: Request) -> JSONResponse:
        inputs = (await request.json())["x"]
        [probability] = booster.predict(np.array([inputs]), num_threads=1)
        return JSONResponse({"probability": float(probability)})

    return app


if __name__ == "__main__":
    served = application(f"{sys.argv[2]}/model.txt")
    uvicorn.run(served, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
