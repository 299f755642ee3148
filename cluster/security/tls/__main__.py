"""`python -m cluster.security.tls`: show, renew and issue certificates."""

from cluster.security.tls.certificates import main

if __name__ == "__main__":
    main()
