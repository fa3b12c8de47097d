package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	ctrl "sigs.k8s.io/controller-runtime"
)

// probes answer from the program's beginning to its end: one that waits for the node is healthy, and not ready, whoever asks and however long.
type probes struct {
	server  *http.Server
	waiting atomic.Pointer[string] // what for; nil when it is at work
}

// serveProbes begins to answer at an address; at "0", nowhere.
func serveProbes(address string) (*probes, error) {
	p := &probes{}
	p.waits("the program begins")
	if address == "0" {
		return p, nil
	}
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("serve health and readiness: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") })
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := p.waiting.Load(); why != nil {
			http.Error(w, "not ready: "+*why, http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, "ok")
	})
	p.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		if err := p.server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			ctrl.Log.Error(err, "health and readiness are served no more")
		}
	}()
	return p, nil
}

// waits says what is waited for.
func (p *probes) waits(why string) { p.waiting.Store(&why) }

// ready says that the program is at work.
func (p *probes) ready(context.Context) error {
	p.waiting.Store(nil)
	return nil
}

func (p *probes) close() {
	if p.server != nil {
		p.server.Close()
	}
}
