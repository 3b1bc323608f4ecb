"""Laws that every model family obeys, so that streams, engines, checkpoints and decoders work with it.

`byteloom check-family NAME` runs them from the command line. A test runs them with pytest:

    from pretrain.conformance import LAWS, Law, Subject

    @pytest.mark.parametrize("law", LAWS, ids=str)
    def test_my_family_obeys(law: Law, tmp_path: Path):
        law.check(Subject.of("my_family"), tmp_path)
"""

from pretrain.conformance.engines import ENGINE_LAWS
from pretrain.conformance.examples import EXAMPLE_LAWS
from pretrain.conformance.models import MODEL_LAWS
from pretrain.conformance.subject import BrokenLawError, Law, Subject

LAWS: tuple[Law, ...] = (*MODEL_LAWS, *EXAMPLE_LAWS, *ENGINE_LAWS)
"""All laws, from the cheapest to the dearest."""

__all__ = ["ENGINE_LAWS", "EXAMPLE_LAWS", "LAWS", "MODEL_LAWS", "BrokenLawError", "Law", "Subject"]
