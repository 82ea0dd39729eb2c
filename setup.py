"""Installation; see README.md."""

from pathlib import Path

from setuptools import find_packages, setup

BENCH = ["matplotlib>=3.8,<4", "pandas>=2.2,<4", "torchvision>=0.26,<0.30", "transformers>=5,<6"]
DRAW = ["matplotlib>=3.8,<4", "pydot>=4,<5"]
HIGHS = ["highspy>=1.11,!=1.12.*,<2"]  # 1.12 prints to standard output, whatever it is told
CPSAT = ["ortools>=9.15,<10"]
GUROBI = ["gurobipy>=13,<14"]
CHECK = ["import-linter>=2.3,<3", "mypy>=1.18,<3", "ruff>=0.14,<1"]

setup(
    name="olla",
    version="0.1.0",
    description="Plans and runs PyTorch steps in less memory: operator order, lifetimes and addresses of arrays",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["olla", "olla.*"]),
    package_data={
        "olla": ["py.typed"],
        "olla.capture.rewrite": ["*.cpp"],
        "olla.run": ["*.h", "*.cpp"],
        "olla.show": ["*.html"],
    },
    install_requires=["numba>=0.61,<1", "numpy>=1.26,<3", "rich>=13,<16", "scipy>=1.11,<2", "torch>=2.11,<2.15"],
    entry_points={
        "console_scripts": ["olla = olla.cli:main"],
        "torch_dynamo_backends": ["olla = olla.backend.backend:olla"],
    },
    extras_require={
        "bench": BENCH,
        "check": CHECK,
        "cpsat": CPSAT,
        "draw": DRAW,
        "gurobi": GUROBI,
        "highs": HIGHS,
        "test": [
            *BENCH,
            *DRAW,
            *HIGHS,
            *CPSAT,
            *GUROBI,
            "accelerate>=1.1,<2",
            "hypothesis>=6.100,<7",
            "networkx>=3.2,<4",
        ],
    },
)
