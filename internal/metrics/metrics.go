// Package metrics shows Prometheus what a source or a dest does. The metrics are
// listed in docs/CONTROL.md.
package metrics

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/silo-nbd/silo-nbd/internal/control"
	"github.com/silo-nbd/silo-nbd/pkg/lazy"
	"github.com/silo-nbd/silo-nbd/pkg/migrate"
)

const (
	// requestTime is how long a request may take to come, and its answer to go.
	requestTime = 10 * time.Second
	idleTime    = 5 * time.Minute // Prometheus keeps its connection
	maxHeader   = 16 << 10        // bytes
	// maxScrapes is how many may be answered at once.
	maxScrapes = 4
	closeTime  = time.Second // how long answers under way may hold up Close
)

// Sight is what there is to see of a process. What is nil is not shown.
type Sight struct {
	Role, Version string
	Disks         func() []migrate.DiskStatus
	Devices       func() map[string]lazy.Stats // of a dest, by the disk's name
	Path          func() (migrate.Path, bool)  // of a source; false: no connection
	Pace          control.Pacer                // of a source
	NBD           func() control.NBD
}

// Server answers Prometheus.
type Server struct {
	http  http.Server
	loops sync.WaitGroup
}

// Start serves /metrics on ln until Close.
func Start(ln net.Listener, see Sight, log *slog.Logger) *Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{see}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes, Timeout: requestTime, ErrorHandling: promhttp.ContinueOnError,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelError),
	}))
	s := &Server{http: http.Server{
		Handler:           mux,
		ReadHeaderTimeout: requestTime, ReadTimeout: requestTime, WriteTimeout: 2 * requestTime, IdleTimeout: idleTime,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}
	s.loops.Go(func() {
		if err := s.http.Serve(crowded(ln)); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the metrics cannot be read any more", "error", err)
		}
	})
	return s
}

// Close ends the server.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	s.loops.Wait()
	return err
}
