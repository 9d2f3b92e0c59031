"""Write a bundle as a package that a platform deploys: the bundle, pinned requirements, and an entry point that proves it first.

lightning-accel package artifacts --oci --out image          # a Dockerfile for `lightning-accel serve`
lightning-accel package artifacts --hf-endpoint --out repo   # a repository for the Hugging Face Hub, with a model card
"""

import argparse
from pathlib import Path

_NEXT = {
    "oci": "docker build -t {name} {out} && docker run -p 8000:8000 {name}",
    "sagemaker": "push the image of {out}/Dockerfile, and upload {out}/model.tar.gz",
    "hf-endpoint": "hf upload USER/{name} {out}",
    "azureml": "register {out}/model, and deploy it with {out}/code/score.py and {out}/conda.yaml",
    "mlflow": "mlflow.pyfunc.load_model('{out}/model')",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    kinds = parser.add_mutually_exclusive_group(required=True)
    for kind, text in {
        "oci": "an image that serves over HTTP",
        "sagemaker": "an image and model.tar.gz for Amazon SageMaker",
        "hf-endpoint": "a repository for the Hugging Face Hub and its inference endpoints",
        "azureml": "a scoring script for Azure Machine Learning",
        "mlflow": "an MLflow model from code",
    }.items():
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=text)
    parser.add_argument("--out", type=Path, required=True, help="folder of the package")
    parser.add_argument("--name", help="name of the model; default: that of the bundle's folder")


def run(arguments: argparse.Namespace) -> int:
    """Write and print."""
    from lightning_accel.serving.packages.write import write_package

    out = write_package(arguments.bundle, arguments.kind, arguments.out, name=arguments.name)
    name = arguments.name or arguments.bundle.resolve().name
    print(f"{out}: {name} for {arguments.kind}; next: {_NEXT[arguments.kind].format(name=name, out=out)}")
    return 0
