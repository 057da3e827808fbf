# Puts the notebooks of _build/colab on the branch that the Colab buttons open.
set -euo pipefail
branch=$(sed -n 's/^colab_branch = //p' settings.ini)
cd _build/colab
git init -q -b "$branch"
git add *.ipynb
git -c user.name="$GITHUB_ACTOR" -c user.email="$GITHUB_ACTOR@users.noreply.github.com" \
  commit -qm "Notebooks of $GITHUB_SHA"
git push -qf "https://x-access-token:$GH_TOKEN@github.com/$GITHUB_REPOSITORY" "$branch"
