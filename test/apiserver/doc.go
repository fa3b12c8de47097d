// Package apiserver runs a real kube-apiserver on a real etcd, for tests of what VMckpt says to Kubernetes.
package apiserver
