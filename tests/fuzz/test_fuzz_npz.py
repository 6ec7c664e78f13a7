"""Statistics and samples from anywhere: an npz or a torch-fidelity .pt gives a reference or one line."""

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated, refused, written

from eval.scoring.files import read_npz
from eval.scoring.references import open_reference
from eval.scoring.sources import read_images
from meanflow.errors import AssetError

MU, SIGMA = np.arange(3.0), np.eye(3)
LAYOUTS = [
    {"mu": MU, "sigma": SIGMA, "extractor": np.array("pixels"), "weights": np.array("w"), "n": np.array(9)},
    {"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA, "arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
    {"ref_mu": MU, "ref_sigma": SIGMA},
    {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)},
]
WORDS = [b"'descr': '|O'", b"'<U99999999'", b"(9999999999,)", b"(-1,)", b"(0,)", b"()", b"True", b"'<f8'", b"'>f4'"]
WORDS += [b"'|V0'", b"[('a', '<f8')]", b"'<m8[s]'", b"(1, 2, 3)", b"\x93NUMPY", b"{", b"(" * 300, b"9" * 5000, b"None"]


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return out.getvalue()


MEMBERS = [{name: npy(array) for name, array in layout.items()} for layout in LAYOUTS]


def read(path: Path) -> None:
    """By each reader, as one test: the first refusal does not hide the second reader."""
    refused(lambda: open_reference(str(path), path.parent, allow_download=False))
    refused(lambda: read_images(path))


@given(mutated([npz(members, method) for members in MEMBERS for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]))
def test_a_mutated_npz(tmp_path_factory, data):
    read(written(tmp_path_factory.getbasetemp() / "a.npz", data))


@given(st.data())
def test_a_mutated_array_in_a_whole_npz(tmp_path_factory, data):
    members = dict(data.draw(st.sampled_from(MEMBERS)))
    name = data.draw(st.sampled_from(list(members)))
    members[name] = data.draw(mutated([members[name], *(m for one in MEMBERS for m in one.values())], WORDS))
    read(written(tmp_path_factory.getbasetemp() / "b.npz", npz(members)))


VALUES = st.one_of(
    st.floats(width=64),
    st.lists(st.floats(width=64), max_size=4),
    st.lists(st.lists(st.floats(width=64), min_size=2, max_size=2), max_size=3),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.complex_numbers(),
)


@given(st.dictionaries(st.sampled_from(["mu", "sigma", "ref_mu", "ref_sigma", "arr_0", "n", "extractor"]), VALUES))
def test_arrays_of_any_kind_under_the_known_names(tmp_path_factory, arrays):
    path = tmp_path_factory.getbasetemp() / "c.npz"
    np.savez(path, **arrays)
    read(path)


def saved(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


@given(mutated([saved({"mu": MU, "sigma": SIGMA}), pickle.dumps({"mu": MU, "sigma": SIGMA}, protocol=2)]))
def test_mutated_statistics_of_torch_fidelity(tmp_path_factory, data):
    path = written(tmp_path_factory.getbasetemp() / "d.pt", data)
    refused(lambda: open_reference(str(path), path.parent, allow_download=False))


# --- bombs -----------------------------------------------------------------------------------------------------


def test_an_array_of_zeros(tmp_path):
    head = npy(np.zeros((0, 2**16, 1), np.uint8)).replace(b"(0, 65536, 1), }   ", b"(5120, 65536, 1), }")
    archive = zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("arr_0.npy", "w") as member:
        member.write(head)
        for _ in range(5):
            member.write(bytes(2**26))
    with pytest.raises(AssetError, match="arr_0 unpacks to 320 MB"):
        read_images(tmp_path / "bomb.npz")


def test_an_array_that_claims_more_than_there_is(tmp_path):
    for claim in (b"(9999999999,)", b"(999999999999999,)", b"(99999999999999999999999,)"):
        header = npy(MU).replace(b"(3,), }" + b" " * (len(claim) - 4), claim + b", }")
        assert claim in header
        path = written(tmp_path / "claim.npz", npz({"mu": header, "sigma": npy(SIGMA)}))
        with pytest.raises(AssetError, match="not a readable npz"):
            read_npz(path)["mu"]
