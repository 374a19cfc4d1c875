"""Uploads to the Hub: private unless said otherwise, with the token of the Hub's own login or HF_TOKEN, which is never shown or stored."""

from pathlib import Path
from typing import Literal

from garage.core.errors import UserError


def push(folder: Path, repo: str, *, kind: Literal["model", "dataset"], private: bool = True) -> str:
    """Upload a folder to `org/name`, made if it does not exist; returns its address.

    Raises:
        UserError: there is no login, the name is refused, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi  # slow to import, and needed only here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi()
    try:
        url = str(api.create_repo(repo, repo_type=kind, private=private, exist_ok=True))
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message="Upload by garage")
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no name of a Hub repository", remedy="give org/name") from error
    except LocalTokenNotFoundError as error:
        raise UserError("there is no Hub login", remedy="set HF_TOKEN, or run `hf auth login`") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        remedy = "set HF_TOKEN to a token that may write there" if status in (401, 403) else "check the name, then try again"
        raise UserError(f"the Hub refuses {repo} ({status})", remedy=remedy) from error
    except OSError as error:
        raise UserError(f"the Hub cannot be reached: {error}", remedy=f"the files are in {folder}: push them later") from error
    return url
