package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/silo-nbd/silo-nbd/internal/addr"
	"github.com/silo-nbd/silo-nbd/internal/connect"
	"github.com/silo-nbd/silo-nbd/internal/tlsdir"
)

// addrFlag is an address on the command line.
type addrFlag struct{ addr.Addr }

func (a *addrFlag) Set(s string) (err error) {
	a.Addr, err = addr.Parse(s)
	return err
}

func (a *addrFlag) String() string {
	if a.IsZero() {
		return ""
	}
	return a.Addr.String()
}

func (*addrFlag) Type() string { return "ADDR" }

// wireFlags say how one end of a migration reaches the other.
type wireFlags struct {
	listen, connect addrFlag
	timeout         time.Duration
	insecure        bool
	tls             string
	allow           []string
}

func (w *wireFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.Var(&w.listen, "listen", "wait for the other end here: host:port or unix:///path")
	f.Var(&w.connect, "connect", "the other end is here: host:port or unix:///path")
	f.DurationVar(&w.timeout, "connect-timeout", 10*time.Second,
		"how long the first connection may fail; a connection that breaks later is made again without limit")
	f.BoolVar(&w.insecure, "insecure", false, "listen in plain text also where other hosts can reach it")
	f.StringVar(&w.tls, "tls", "", "speak TLS 1.3 only, with the ca-cert.pem, cert.pem and key.pem of `DIR`")
	f.StringArrayVar(&w.allow, "tls-allow", nil, "of those who connect by TLS let in only who has a certificate for `NAME`; may be given again")
}

// check refuses what makes no sense together.
func (w *wireFlags) check() error {
	switch {
	case w.listen.IsZero() && w.connect.IsZero():
		return usagef("neither --listen nor --connect: want one of them, and the other on the other host")
	case !w.listen.IsZero() && !w.connect.IsZero():
		return usagef("--listen and --connect: want only one of them")
	case w.timeout <= 0:
		return usagef("--connect-timeout: %v is no time to wait: want more than 0s", w.timeout)
	case len(w.allow) > 0 && w.tls == "":
		return usagef("--tls-allow: without --tls DIR nobody shows a certificate")
	case slices.Contains(w.allow, ""):
		return usagef("--tls-allow: the name is empty: want one that stands in a client's certificate")
	}
	return w.checkListener("--listen", w.listen)
}

// checkListener refuses a plain text listener that other hosts can reach,
// unless that is asked for.
func (w *wireFlags) checkListener(flag string, a addrFlag) error {
	if a.IsZero() || a.IsLocal() || w.insecure || w.tls != "" {
		return nil
	}
	return usagef("%s %s: other hosts can reach that address, and what they say and hear is not encrypted: give --tls DIR, or --insecure if the network is trusted, or listen on a loopback address or a unix socket", flag, a.String())
}

// certificates reads those of --tls; nil without it. serves says that others
// connect to us also for something else than the migration.
func (w *wireFlags) certificates(serves bool, log *slog.Logger) (*tlsdir.Dir, error) {
	if w.tls == "" {
		return nil, nil
	}
	certs, err := tlsdir.Open(w.tls, tlsdir.Options{
		Listen: serves || !w.listen.IsZero(), Dial: !w.connect.IsZero(), Allow: w.allow, Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("--tls: %w", err)
	}
	return certs, nil
}

// open gives the connections of a migration. Close what it returns.
func (w *wireFlags) open(ctx context.Context, certs *tlsdir.Dir, log *slog.Logger) (connect.Ends, error) {
	if !w.connect.IsZero() {
		return connect.Dial(w.connect.Addr, w.timeout, certs), nil
	}
	ln, err := w.listen.Listen(ctx)
	if err != nil {
		return nil, err
	}
	log.Info("waiting for the other end", "listen", listenAddr(ln))
	return connect.Accept(ln, certs, log), nil
}

// stallFlag is what becomes of a read that waits: nothing, or an error after
// so long.
type stallFlag time.Duration

func (s *stallFlag) Set(text string) error {
	if text == "wait" {
		*s = 0
		return nil
	}
	after, found := strings.CutPrefix(text, "error=")
	d, err := time.ParseDuration(after)
	if !found || err != nil || d <= 0 {
		return fmt.Errorf("%q is no rule for reads that wait: want wait, or error=DURATION such as error=60s", text)
	}
	*s = stallFlag(d)
	return nil
}

func (s *stallFlag) String() string {
	if *s == 0 {
		return "wait"
	}
	return "error=" + time.Duration(*s).String()
}

func (*stallFlag) Type() string { return "wait|error=DURATION" }

func listenAddr(ln net.Listener) string { return addr.Of(ln.Addr()).String() }

// logFormat is how log lines look.
type logFormat string

func (f *logFormat) Set(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("%q is no log format: want text or json", s)
	}
	*f = logFormat(s)
	return nil
}

func (f *logFormat) String() string { return string(*f) }
func (*logFormat) Type() string     { return "text|json" }

func (f *logFormat) add(cmd *cobra.Command) {
	cmd.Flags().Var(f, "log-format", "log lines as text or json, also on a terminal, which otherwise shows bars")
}
