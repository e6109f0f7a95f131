#!/usr/bin/env bash
# A static site of the committed token pages: bash .github/site.sh FOLDER, then open FOLDER/index.html.
set -euo pipefail
cd "$(dirname "$0")/.."
site=${1:?name the folder that the site goes into: bash .github/site.sh FOLDER}
mkdir -p "$site"
cp results/run/tokens-*.html docs/btx.svg "$site"
{
    echo '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    echo '<title>nanoBTX, token by token</title>'
    echo '<style>body { font: 1.1rem/1.6 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem }'
    echo 'img { max-width: 100% } :root { color-scheme: light dark }</style>'
    echo '<h1>nanoBTX, token by token</h1><img src="btx.svg" alt="seed, branches, mixture, finetuning">'
    echo '<p>Held-out text, each token coloured by the two experts that its router chose:</p><ul>'
    for page in "$site"/tokens-*.html; do
        domain=$(basename "$page" .html)
        echo "<li><a href=\"$domain.html\">${domain#tokens-}</a></li>"
    done
    echo '</ul></html>'
} > "$site/index.html"
