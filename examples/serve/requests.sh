#!/bin/sh
# Calls of cemg-serve with curl: sh requests.sh [URL]. With API keys, add -H 'X-API-Key: …' to each.
set -eu
url=${1:-http://localhost:8000}

post() { # path, JSON
    curl -sS --fail-with-body "$url$1" -H 'content-type: application/json' -d "$2" && echo
}

# Items that end with their semantic IDs once the service has computed them.
post /v1/items '{"items": [
  {"item_id": "new/1", "title": "Sturdy rudder", "text": "for the garden", "attributes": {"price": 9.5}},
  {"item_id": "new/2", "title": "Plain telescope", "attributes": {"price": 99, "tags": ["toy", "sale"]}}]}'
until curl -sS --fail-with-body "$url/v1/items/new%2F1" | grep -q '"state":"active"'; do sleep 0.2; done
# An event with the same event_id is stored once, however often it is sent.
post /v1/events '{"events": [{"event_id": "click-1", "user_id": "ann", "item_id": "item-0012", "type": "click"}]}'
post /v1/recommend '{"user_id": "ann", "limit": 3, "exact": true}'
# Lists that hold for a filter are full: the search does not leave the admitted items.
post /v1/recommend '{"history": ["item-0012"], "filter": {"must": [{"key": "price", "range": {"lte": 20}}]}}'
# Several requests share a call.
post /v1/recommend '{"requests": [{"user_id": "ann", "limit": 1}, {"history": ["item-0007"], "limit": 1}]}'
# A slash in an id is encoded in a path.
curl -sS --fail-with-body -X PATCH "$url/v1/items/new%2F1" -H 'content-type: application/json' \
    -d '{"attributes": {"price": 8.5}}' && echo
curl -sS --fail-with-body "$url/v1/items/new%2F1" && echo
curl -sS --fail-with-body -X DELETE "$url/v1/items/new%2F2" && echo
curl -sS --fail-with-body "$url/v1/catalog/changes?after=0" && echo
curl -sS --fail-with-body -X DELETE "$url/v1/users/ann" && echo
