"""The bundle as an MLflow model from code: MLflow runs this file, and pickles nothing."""

from typing import Any

import mlflow

from lightning_accel.serving.packages.bundle_model import BundleModel


class BundlePyfunc(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # MLflow is no dependency
    """What MLflow asks for."""

    def load_context(self, context: Any) -> None:
        """Load and prove the bundle among the model's artifacts."""
        self.model = BundleModel(context.artifacts["bundle"])

    # MLflow takes type hints for the rows of a table, and warns of others.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
        """Outputs by name, for arrays or nested lists by input."""
        return self.model.run(model_input)


mlflow.models.set_model(BundlePyfunc())
