"""Outcomes over HTTP: what came true for a prediction. The application that requested the prediction posts it later."""
