// Package totals counts the objects there are, for metrics.
package totals

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"sigs.k8s.io/controller-runtime/pkg/client"

	vmckptv1 "github.com/vmckpt/vmckpt/api/v1alpha1"
)

var (
	checkpoints = prometheus.NewDesc("vmckpt_checkpoints", "VMCheckpoints there are, by phase.", []string{"phase"}, nil)
	restores    = prometheus.NewDesc("vmckpt_restores", "VMRestores there are, by phase.", []string{"phase"}, nil)
)

// Collector counts VMCheckpoints and VMRestores by phase whenever it is asked, in the manager's cache. It is asked while its manager leads: from two
// of them, whoever adds up would have every object twice.
type Collector struct {
	Reader   client.Reader
	Registry prometheus.Registerer
}

// Start tells the totals until ctx ends.
func (c *Collector) Start(ctx context.Context) error {
	if err := c.Registry.Register(c); err != nil {
		return fmt.Errorf("register the totals: %w", err)
	}
	<-ctx.Done()
	c.Registry.Unregister(c)
	return nil
}

// NeedLeaderElection says that it starts with the manager's leading.
func (c *Collector) NeedLeaderElection() bool { return true }

// Describe implements prometheus.Collector.
func (c *Collector) Describe(to chan<- *prometheus.Desc) {
	to <- checkpoints
	to <- restores
}

// askBound is how long the cache may take to answer.
const askBound = 5 * time.Second

// Collect implements prometheus.Collector.
func (c *Collector) Collect(to chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), askBound)
	defer cancel()
	var cs vmckptv1.VMCheckpointList
	if err := c.Reader.List(ctx, &cs); err != nil {
		to <- prometheus.NewInvalidMetric(checkpoints, err)
	}
	byPhase := map[string]int{}
	for i := range cs.Items {
		byPhase[string(cs.Items[i].Status.Phase)]++
	}
	send(to, checkpoints, byPhase)
	var rs vmckptv1.VMRestoreList
	if err := c.Reader.List(ctx, &rs); err != nil {
		to <- prometheus.NewInvalidMetric(restores, err)
	}
	byPhase = map[string]int{}
	for i := range rs.Items {
		byPhase[string(rs.Items[i].Status.Phase)]++
	}
	send(to, restores, byPhase)
}

func send(to chan<- prometheus.Metric, desc *prometheus.Desc, byPhase map[string]int) {
	for phase, n := range byPhase {
		if phase == "" {
			phase = "New"
		}
		to <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, float64(n), phase)
	}
}
