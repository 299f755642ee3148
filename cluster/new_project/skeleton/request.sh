#!/bin/sh
# Asks the served model about machine 7: sh request.sh
set -e
TOKEN=$(python -m cluster.security.identity token --sub me --role service)
curl --silent --show-error --fail-with-body --cacert .falaj/tls/ca.pem -H "Authorization: Bearer $TOKEN" -H "X-Unit-ID: 7" \
     -d '{"entities": [{"machine_id": 7}]}' "${EDGE:-https://127.0.0.1:8443}/v1/models/failure:predict"
