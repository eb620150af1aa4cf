"""Sites as text: importable names for files, on this machine and on another."""

from __future__ import annotations

import subprocess
import sys

import pytest
from small_plans import linear_site

from colrow.planner.site_text import Sources, chain_text, parse_chain
from colrow.planner.sites import Frame, frame_of


def there_and_back(frames):
    return parse_chain(chain_text(frames, Sources()), Sources())


def test_a_frame_names_its_module_not_its_file():
    (frame,) = linear_site("x").frames
    text = chain_text((frame,), Sources())
    assert text == f"torch.nn.modules.linear:Linear.forward@{frame.firstlineno}+4:15-54"
    assert parse_chain(text, Sources()) == (frame,)


@pytest.mark.parametrize("span", [(0, 0, 0, 1), (3, 12, 8, 5), (-1, -1, -1, -1), (-2, -2, 0, 4)])
@pytest.mark.parametrize("file", ["<string>", "/nowhere/at all/x.py", linear_site("x").frames[0].file])
def test_chains_are_read_back(span, file):
    frames = (Frame(file, "f.<locals>.<listcomp>", 12, span), *linear_site("x").frames)
    assert there_and_back(frames) == frames


def test_a_real_frame_is_read_back():
    frame = frame_of(sys._getframe().f_code, sys._getframe().f_lasti)
    assert there_and_back((frame,)) == (frame,)


def test_a_module_that_is_not_here_keeps_its_name():
    text = "no_such_package.model:Block.forward@3+1:4-9"
    assert chain_text(parse_chain(text, Sources()), Sources()) == text


@pytest.mark.parametrize("text", ["x", "a:b", "a:b@1+2", "a:b@1+2:3", "@1+2:3-4", "a:b@1+2:3-4 >"])
def test_other_text_is_no_site(text):
    with pytest.raises(ValueError, match="not a place in the source"):
        parse_chain(text, Sources())


def test_finding_a_module_imports_nothing(cwd, monkeypatch):
    (cwd / "pack").mkdir()
    (cwd / "pack" / "__init__.py").write_text("raise SystemExit('imported')")
    (cwd / "pack" / "model.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(cwd))
    (frame,) = parse_chain("pack.model:f@1+0:0-1", Sources())
    assert frame.file == str(cwd / "pack" / "model.py")
    assert chain_text((frame,), Sources()) == "pack.model:f@1+0:0-1"
    assert "pack" not in sys.modules


def test_a_script_is_named_as_others_import_it(cwd):
    (cwd / "script.py").write_text(
        "import sys\n"
        "from colrow.planner.sites import frame_of\n"
        "from colrow.planner.site_text import Sources, chain_text\n"
        "frame = frame_of(sys._getframe().f_code, sys._getframe().f_lasti)\n"
        "print(chain_text((frame,), Sources()))\n"
    )
    shown = subprocess.run([sys.executable, "script.py"], capture_output=True, text=True, check=True, cwd=cwd).stdout
    assert shown.startswith("script:<module>@")
